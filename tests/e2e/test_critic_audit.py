"""`nightschool critic audit` on the shop: the shipped critic against the shop's gold set, beside a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nightschool_server.home import Home

from examples.shop.families import FAMILIES
from examples.shop.gold_set import EACH, GOLD, write
from tests.harness import ROOT
from tests.learner.processes import serving


def nightschool(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NIGHTSCHOOL_HOME": str(home.path)}
    return subprocess.run(
        [sys.executable, "-c", "from nightschool.cli import main; main()", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_shop_s_gold_set_is_what_its_script_makes(tmp_path: Path) -> None:
    write(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in GOLD.iterdir()}


def test_the_shop_s_critic_is_better_than_the_paper_s_and_an_audit_costs_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with serving(home):
        first = nightschool(home, "critic", "audit", "--app", "examples.shop.app:app", "--json")
        assert first.returncode == 0, first.stderr
        found = json.loads(first.stdout)
        agreement = found["agreement"]
        assert agreement["num_pairs"] == EACH * len(FAMILIES)
        assert agreement["rate"] >= 0.9
        assert agreement["against_paper"] == "above"
        assert agreement["kappa"] >= 0.8
        assert agreement["parse_failure_rate"] == 0
        assert agreement["abstention_rate"] < 0.6, "slips that it never saw leave it unsure"
        assert 0.4 < agreement["first_win_rate"]["low"] < 0.5 < agreement["first_win_rate"]["high"] < 0.6
        assert (found["num_cached"], found["faults"]) == (0, [])

        again = nightschool(home, "critic", "audit", "--app", "examples.shop.app:app", "--json")
        cached = json.loads(again.stdout)
        assert (cached["num_cached"], cached["num_tokens"]) == (2 * EACH * len(FAMILIES), 0)
        assert cached["agreement"] == agreement

        untrusted = nightschool(
            home, "critic", "audit", "--app", "examples.shop.app:app",
            "--set", "learner.critic.min_agreement=1.0", "--set", "learner.critic.margin_nats=0",
        )  # fmt: skip
        assert untrusted.returncode == 1
        assert "not to be trusted" in untrusted.stdout
        assert "against_paper" not in untrusted.stdout
