"""What an early stop of the gate's evaluation saves and what it costs, by simulation.

    python bench/gate.py [--tasks 440] [--runs 1000] [--json FILE]

Evaluations are drawn with a known true difference and share of differing tasks. Each is judged twice: by McNemar's
exact test at the end, as by default, and by the early stop at its looks (`gate.first_look`, `gate.look_every`), with
the thresholds of `GateConfig`. Only the rules `tasks` and `significance` are simulated. The last line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
from nightschool_learner.gate import needed_e_value
from nightschool_learner.sequential import Counts, evidence_above, evidence_below, looks
from nightschool_learner.statistics import mcnemar_p, minimum_detectable_difference
from nightschool_server.config.training import GateConfig

CASES = ((-0.1, 0.25), (0.0, 0.02), (0.0, 0.1), (0.0, 0.25), (0.05, 0.25), (0.07, 0.25), (0.1, 0.25), (0.15, 0.3),
         (0.25, 0.3))  # fmt: skip
"""True difference and share of tasks that differ."""


@dataclass(frozen=True)
class Row:
    """One case."""

    difference: float
    discordant: float
    accepted: float
    """Share of runs that the early stop accepted."""
    given_up: float
    """Share that it gave up."""
    mean_tasks: float
    """Measured on the candidate before it ended."""
    accepted_at_end: float
    """Share that McNemar's test at the end accepts."""


def main() -> None:
    """Simulate every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=440)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the last line's JSON to this file")
    arguments = parser.parse_args()
    rows = [simulate(*case, num_tasks=arguments.tasks, num_runs=arguments.runs) for case in CASES]
    print(f"{'difference':>10} {'differing':>9} {'accepted':>9} {'given up':>9} {'tasks':>6} {'at the end':>11}")
    for row in rows:
        print(
            f"{row.difference * 100:>+9.1f}% {row.discordant:>9.0%} {row.accepted:>9.1%} {row.given_up:>9.1%} "
            f"{row.mean_tasks:>6.0f} {row.accepted_at_end:>11.1%}"
        )
    last = json.dumps({"tasks": arguments.tasks, "runs": arguments.runs, "cases": [asdict(row) for row in rows]})
    if arguments.json:
        arguments.json.write_text(last + "\n")
    print(last)


def simulate(difference: float, discordant: float, *, num_tasks: int, num_runs: int) -> Row:
    """One case, seeded."""
    rng = np.random.default_rng(17)
    chances = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    ends = [_run(rng.choice([1, -1, 0], size=num_tasks, p=chances)) for _ in range(num_runs)]
    verdicts, ns, at_end = zip(*ends, strict=True)
    return Row(
        difference,
        discordant,
        verdicts.count("accepted") / num_runs,
        verdicts.count("futile") / num_runs,
        sum(ns) / num_runs,
        sum(at_end) / num_runs,
    )


def _run(x: np.ndarray) -> tuple[str, int, bool]:
    """Verdict and tasks of the early stop, and whether the test at the end accepts."""
    limits, n = GateConfig(), len(x)
    bound = minimum_detectable_difference(n, 0.25, alpha=limits.max_p)
    gained, lost = int((x == 1).sum()), int((x == -1).sum())
    at_end = mcnemar_p(gained, lost) <= limits.max_p and gained > lost
    for look in looks(n, limits.first_look, limits.look_every):
        counts = Counts(*(int((x[:look] == value).sum()) for value in (1, -1, 0)))
        if evidence_below(counts, bound) >= 1 / limits.max_futility_error:
            return "futile", look, at_end
        if look >= limits.min_n and evidence_above(counts, 0.0) >= needed_e_value(limits):
            return "accepted", look, at_end
    return "complete", n, at_end


if __name__ == "__main__":
    main()
