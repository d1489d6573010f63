"""The rows of the table: which nights are run, and what is different about each.

A row is one or more cycles on a home of its own, all from the shipped model with the shop's settings; what it varies
are overrides, as `nightschool cycles trigger --set` takes them. Every first cycle of `ABLATIONS` and `RECIPES` begins
on a copy of the same home and with the same seed, so that two rows differ in what is named and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["cycles", "ablations", "recipes"]

SEED = 1
"""Of every first cycle, and of the traffic before it; later rounds count on from here."""
NUM_REQUESTS = 200
"""Live requests before each cycle."""
NUM_CYCLES = 5

FULL_EVALUATION = ("evaluate.num_seeds=5", "evaluate.max_sampled_tasks=0")
"""Beside the greedy one, five sampled answers to every held-out task."""
UNAUDITED = ("critic.min_agreement=0.01",)
"""The audit is made, and stops nothing: it would end a night whose critic is the worse for what was taken away."""
SETTLED_TOO = ("pairs.max_lead_nats=0", "pairs.min_pairs=4")
"""Trains on pairs that the policy has settled, too, however few there are."""
SMALL = (
    "synthesize.num_tasks=60", "pairs.min_pairs=4", "train.epochs=1", "evaluate.max_tasks=60", "evaluate.num_seeds=2",
    "gate.min_n=20",
)  # fmt: skip
"""Of a quick run, on top of everything else: enough to see that a row works, too little to see what it shows."""


@dataclass(frozen=True)
class Row:
    """One row."""

    name: str
    group: Group
    what: str
    """What is different, in a few words."""
    overrides: tuple[str, ...] = ()
    """Of each of its cycles."""
    seed: int = SEED
    num_rounds: int = 1
    measures_active: bool = False
    """Whether the active adapter is measured after every cycle, by FULL_EVALUATION."""
    has_ruled_critic: bool = False
    """Whether the critic is the one of `ruled.py`, which any recipe can ask."""


def _explore(stage: str) -> tuple[str, ...]:
    return (f"stages.explore=bench.nights.unguarded:{stage}", *UNAUDITED)


CYCLES = (
    Row(
        "cycles", "cycles", "five nights in a row, as shipped", FULL_EVALUATION, SEED, NUM_CYCLES, measures_active=True
    ),
)
ABLATIONS = (
    Row("as_shipped", "ablations", "nothing"),
    Row("as_shipped_again", "ablations", "nothing but the cycle's seed", seed=101),
    Row("one_order", "ablations", "the critic is asked in one order only", _explore("one_order")),
    Row("default_first", "ablations", "an unsure critic votes for the first candidate", _explore("first_by_default")),
    Row("failing", "ablations", "30% of the critic's answers fail; it abstains", _explore("failing")),
    Row("failing_first", "ablations", "30% fail; a failure votes for the first candidate", _explore("failing_first")),
    Row("no_nll", "ablations", "no NLL term on the chosen answers", ("train.nll_weight=0",)),
    Row("no_anchors", "ablations", "no anchors", ("pairs.anchors_per_pair=0",)),
    Row("anchors_by_tool", "ablations", "anchors take turns by tool, not by step", ("pairs.anchor_turns=tool",)),
    Row("anchors_by_tool_again", "ablations", "the same, and the cycle's seed", ("pairs.anchor_turns=tool",), seed=101),
    Row("neither", "ablations", "no NLL term, no anchors", ("train.nll_weight=0", "pairs.anchors_per_pair=0")),
    Row("no_forks", "ablations", "the candidates of a step share one state", _explore("shared_state")),
    Row("n_2", "ablations", "2 candidates a step", ("explore.num_candidates=2",)),
    Row("n_3", "ablations", "3 candidates a step", ("explore.num_candidates=3",)),
    Row("n_5", "ablations", "5 candidates a step", ("explore.num_candidates=5",)),
    Row("n_8", "ablations", "8 candidates a step", ("explore.num_candidates=8",)),
    Row(
        "settled_too", "ablations", "pairs that the policy has settled are trained on, too; the gate decides",
        SETTLED_TOO, num_rounds=3,
    ),
    Row(
        "no_gate", "ablations", "the same, and whatever was trained is promoted",
        (*SETTLED_TOO, "stages.promote=bench.nights.unguarded:ungated", "train.validation_share=0"), num_rounds=3,
    ),
    Row(
        "inverted", "ablations", "the critic prefers the worse; the gate decides",
        ("fault_injection.invert_critic=true",),
    ),
)  # fmt: skip
RECIPES = (
    Row("sport", "recipes", "DPO on the critic's pairs", ("recipe=sport",)),
    Row("rest", "recipes", "the critic's picks are imitated", ("recipe=rest",)),
    Row("checklist", "recipes", "the critic scores by a checklist that it wrote", ("recipe=checklist",)),
    Row("sport_ruled", "recipes", "`sport`, its critic behind an endpoint", ("recipe=sport",), has_ruled_critic=True),
    Row("rest_ruled", "recipes", "`rest`, the same critic", ("recipe=rest",), has_ruled_critic=True),
    Row("checklist_ruled", "recipes", "`checklist`, the same critic", ("recipe=checklist",), has_ruled_critic=True),
)
ROWS = (*CYCLES, *ABLATIONS, *RECIPES)


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names or groups; all where none is named. Raises ValueError for a name that nothing has."""
    known = {row.name for row in ROWS} | {row.group for row in ROWS}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"no row or group is called {', '.join(unknown)}: there are {', '.join(sorted(known))}")
    return [row for row in ROWS if not names or row.name in names or row.group in names]
