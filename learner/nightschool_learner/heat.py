"""How hot a cycle samples, from how much the steps of the cycles before it differed.

Too cold, and all candidates agree: nothing to learn. Too hot, and they differ in slips: pairs teach noise. What a
model needs changes as it learns (B-STaR, arXiv 2412.17256). So the hot temperature goes a step up after a cycle
in which too few steps had a choice, and a step down after one in which too many had. It follows from the rows of the
cycles before, so that a cycle that is resumed samples as it began. Owns the rule; off without a target.
"""

from __future__ import annotations

from collections.abc import Sequence

from nightschool_server.config.practice import ExploreConfig
from nightschool_server.store.store import Store

from nightschool_learner.coverage import coverage_of

STEP = 1.15
"""By which the temperature is multiplied or divided."""
TOLERANCE = 1.25
"""A share within target / TOLERANCE and target * TOLERANCE leaves the temperature as it is."""
MAX_FACTOR = 1.5
"""How far the temperature goes from the configured one, either way."""
MAX_TEMPERATURE = 4.0
"""What a configuration may name, too."""
NUM_EARLIER = 10
"""Cycles that are looked at, the newest: more than it takes from one bound to the other."""
MIN_STEPS = 50
"""A cycle with fewer says nothing of its share."""


def hot_temperature(store: Store, cycle_id: str, config: ExploreConfig) -> float:
    """The hot temperature of a cycle."""
    if not config.target_choice_share:
        return config.hot_temperature
    newest = store.query(
        "SELECT id FROM cycles WHERE id < ? AND ended_at IS NOT NULL ORDER BY id DESC LIMIT ?", (cycle_id, NUM_EARLIER)
    )
    seen = [coverage_of(store, row["id"]) for row in reversed(newest)]
    shares = [coverage.choice_share for coverage in seen if coverage.num_steps >= MIN_STEPS]
    return min(MAX_TEMPERATURE, config.hot_temperature * factor(shares, config.target_choice_share))


def factor(shares: Sequence[float], target: float) -> float:
    """What cycles with these shares of steps with a choice, the oldest first, have made of a temperature of 1."""
    found = 1.0
    for share in shares:
        if share < target / TOLERANCE:
            found = min(MAX_FACTOR, found * STEP)
        elif share > target * TOLERANCE:
            found = max(1 / MAX_FACTOR, found / STEP)
    return found
