"""What a cycle's practice covered and took, read from the counts of its stages, for `nightschool cycles show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nightschool.cli.output import duration, write_table
from nightschool.records import Cycle

BY_POSITION = ("samples_at_", "actions_at_")
"""Counts of explore by a step's position, which are read together here."""
CLOCK = "_ms"
"""How the counts end that are times."""


def practice_fields(cycle: Cycle) -> Iterator[tuple[str, str]]:
    """(name, value), as `write_fields` takes them; a value is empty where the cycle has not come so far."""
    counts = {stage.name: stage.counts for stage in cycle.stages}
    explore, critique = counts.get("explore", {}), counts.get("critique", {})
    num_pairs = next((stage.num_done for stage in cycle.stages if stage.name == "pairs"), 0)
    yield "different actions", _unique(explore)
    yield "engine busy", _busy(explore)
    yield "critic's cost", _cost(critique, num_pairs)


def write_families(cycle: Cycle) -> None:
    """How well each family of tasks was solved, where the cycle has come so far."""
    rows = [
        [family.name, str(family.num_tasks), f"{family.solve_rate:.0%}", str(family.num_pairs)]
        for family in cycle.task_families
    ]
    if rows:
        write_table(["family of tasks", "tasks", "solved", "pairs"], rows, empty="")


def is_for_people(name: str) -> bool:
    """Whether a count is worth a place on a line about a stage that runs."""
    return not name.startswith(BY_POSITION) and not name.endswith(CLOCK)


def _unique(counts: Mapping[str, int]) -> str:
    """`31% of 900 samples; by step 20%, 45%`."""
    rates: list[float] = []
    while num_samples := counts.get(f"samples_at_{len(rates) + 1}"):
        rates.append(counts.get(f"actions_at_{len(rates) + 1}", 0) / num_samples)
    if not rates:
        return ""
    of_all = counts.get("distinct_actions", 0) / counts["samples"]
    return f"{of_all:.0%} of {counts['samples']} samples; by step {', '.join(f'{rate:.0%}' for rate in rates)}"


def _busy(counts: Mapping[str, int]) -> str:
    """`91% of 33s of practice, waited for 99%`."""
    wall_ms, watched_ms = counts.get("wall_ms", 0), counts.get("watched_ms", 0)
    if not wall_ms or not watched_ms:
        return ""
    busy, asking = counts.get("busy_ms", 0) / watched_ms, counts.get("asking_ms", 0) / wall_ms
    return f"{busy:.0%} of {duration(wall_ms / 1000)} of practice, waited for {asking:.0%}"


def _cost(counts: Mapping[str, int], num_pairs: int) -> str:
    """`1892 tokens and 0.9 s a pair`."""
    if not num_pairs:
        return ""
    tokens = counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0)
    return f"{tokens / num_pairs:.0f} tokens and {counts.get('duels_ms', 0) / 1000 / num_pairs:.2g} s a pair"
