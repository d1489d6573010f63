"""The demo never touches a folder that holds something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_night(home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.shop.night"],
        cwd=ROOT,
        env={**os.environ, "DEMO_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_home_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    done = run_night(tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stdout
    assert (tmp_path / "precious").read_text() == "keep me"
