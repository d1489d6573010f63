"""What one cycle's practice may take: tokens, seconds, tool calls.

Owns the bounds alone. What was taken stands in the counts of `explore`, which rows bring back after a restart. At a
bound no new step and no new rollout begins; steps in flight end, so that a budget may be passed by what they take.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_server.config.practice import ExploreConfig

from nightschool_learner.meter import Meter
from nightschool_learner.stages import Progress


class BudgetSpentError(Exception):
    """The next step may not begin: the rollout ends here."""


@dataclass(frozen=True)
class Budget:
    """The bounds of a cycle, and what it has taken of them."""

    config: ExploreConfig
    explored: Progress
    meter: Meter

    def reached(self) -> str:
        """The bound that is reached, as `setting = value`; empty while none is."""
        counts, config = self.explored.counts, self.config
        bounds = (
            ("max_cycle_tokens", config.max_cycle_tokens, counts.get("tokens", 0)),
            ("max_cycle_s", config.max_cycle_s, self.meter.wall_s),
            ("max_cycle_calls", config.max_cycle_calls, counts.get("calls", 0)),
        )
        return next((f"{name} = {bound:g}" for name, bound, taken in bounds if bound and taken >= bound), "")

    def check(self) -> None:
        """Raise BudgetSpentError where a bound is reached; before every step that is sampled."""
        if reached := self.reached():
            raise BudgetSpentError(f"learner.explore.{reached}")
