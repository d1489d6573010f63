"""The demo as a newcomer runs it: a real server, live traffic, a cycle, the gate, swaps both ways, a sabotage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "before", "after", "n", "interval", "p", "cycle_s", "served", "failed", "promote_s", "rollback_s",
    "sabotage_rejected",
}  # fmt: skip
"""What `report.json` promises to hold."""

pytestmark = pytest.mark.timeout(1800)


def run_night(home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.shop.night"],
        cwd=ROOT,
        env={**os.environ, "DEMO_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1700,
    )


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The demo's home folder, its report and what it printed."""
    home = tmp_path_factory.mktemp("night") / "home"
    done = run_night(home)
    report = home / "report.json"
    assert report.is_file(), done.stdout + done.stderr
    return home, json.loads(report.read_text()), done.stdout


def test_one_night_lifts_held_out_success_and_loses_no_request(night: tuple[Path, dict[str, Any], str]) -> None:
    _, report, output = night
    assert report.keys() >= KEYS
    assert report["n"] >= 400
    assert 0.50 <= report["before"] <= 0.65, output
    assert report["after"] >= 0.85, output
    assert report["p"] < 0.001
    assert report["interval"][0] > 0
    assert report["served"] >= 200
    assert report["failed"] == 0, output


def test_a_second_night_does_not_fall_below_the_first(night: tuple[Path, dict[str, Any], str]) -> None:
    _, report, output = night
    second = report["second_after"]
    if second is None:
        assert report["second_state"] == "stopped", output
    else:
        assert second >= report["after"] or report["second_p"] >= 0.05, output


def test_a_sabotaged_critic_is_stopped_by_the_gate(night: tuple[Path, dict[str, Any], str]) -> None:
    _, report, output = night
    assert report["sabotage_rejected"], output
    assert report["sabotage_after"] < report["after"]


def test_the_night_leaves_plots_and_no_process(night: tuple[Path, dict[str, Any], str]) -> None:
    home, _, _ = night
    assert list(home.glob("cycles/*/plots/*.png"))
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    assert left == []


def test_a_home_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    done = run_night(tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stdout
    assert (tmp_path / "precious").read_text() == "keep me"
