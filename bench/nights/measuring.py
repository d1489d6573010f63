"""A cycle that only measures the adapter that is active, by the evaluate stage as it ships.

As overrides: `MEASURING`. Stages before it have nothing to do, but `train` names the incumbent as the candidate:
the two are one adapter, and every held-out task is answered once. What was measured before is not measured again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from nightschool_learner import records
from nightschool_learner.stages import STAGE_NAMES, Cycle, Ending

MEASURING = tuple(f"stages.{name}=bench.nights.measuring:{name}" for name in STAGE_NAMES if name != "evaluate")


@dataclass(frozen=True)
class Nothing:
    """A stage that has nothing to do."""

    name: str

    async def run(self, cycle: Cycle) -> Ending | None:
        return None


@dataclass(frozen=True)
class Incumbent:
    """A train stage that trains nobody."""

    name: str = "train"

    async def run(self, cycle: Cycle) -> Ending | None:
        records.set_candidate(cycle.store, cycle.id, cycle.incumbent)
        return None


@dataclass(frozen=True)
class Measured:
    """A promote stage that decides nothing."""

    name: str = "promote"

    async def run(self, cycle: Cycle) -> Ending | None:
        return Ending("stopped", f"measured {cycle.incumbent}")


seeds = partial(Nothing, "seeds")
synthesize = partial(Nothing, "synthesize")
explore = partial(Nothing, "explore")
critique = partial(Nothing, "critique")
pairs = partial(Nothing, "pairs")
train = Incumbent
promote = Measured
