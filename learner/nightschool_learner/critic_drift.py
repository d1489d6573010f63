"""Whether a cycle's critic still answers as it did in earlier cycles: an alarm, not a verdict on who is right.

The critic is asked about other candidates every night, so only what should not depend on them is compared: which
of two the order favours, how much of what it says can be read, and what it makes of the same gold set. Earlier cycles
count where their critic had the same settings and wordings. Owns the comparison; what a cycle does about it
is `learner.critic.on_drift`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from nightschool_server.config.roles import CriticConfig
from nightschool_server.store.store import Store
from pydantic import ValidationError

from nightschool_learner.audit import count_answers, latest_audit
from nightschool_learner.replay import rubrics_of, settings_of
from nightschool_learner.stages import Cycle, Ending, Progress
from nightschool_learner.statistics import wilson

logger = logging.getLogger(__name__)

NUM_EARLIER = 5
"""Cycles that a cycle is held against, the newest, taken together."""
LEVEL = 0.99
"""Of the intervals that must not meet: an alarm every night is none."""


@dataclass(frozen=True)
class Count:
    """So many of so many."""

    num: int = 0
    of: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.num + other.num, self.of + other.of)


@dataclass(frozen=True)
class Drift:
    """A share that moved further than chance and the bound allow."""

    name: str
    now: float
    earlier: float
    num_now: int
    num_earlier: int

    def __str__(self) -> str:
        return (
            f"{_IN_WORDS[self.name]}: {self.now:.0%} of {self.num_now}, in earlier cycles {self.earlier:.0%} "
            f"of {self.num_earlier}"
        )


_IN_WORDS = {
    "first_won": "the candidate shown first won",
    "unreadable": "answers that could not be read",
    "gold_agreed": "agreement with the gold set where it decided",
    "gold_decided": "pairs of the gold set that it decided",
}


def drifts_of(store: Store, cycle_id: str) -> tuple[Drift, ...]:
    """What moved against the newest earlier cycles with the same critic; empty where there are none."""
    config = _config_of(store, cycle_id)
    ground = _ground(store, cycle_id)
    # Lazily: a home has hundreds of cycles, and the newest few are enough.
    same = list(islice((one for one in _earlier(store, cycle_id) if _ground(store, one) == ground), NUM_EARLIER))
    if config is None or not same:
        return ()
    now = _counts(store, cycle_id)
    pooled = {name: Count() for name in now}
    for one in same:
        for name, count in _counts(store, one).items():
            pooled[name] += count
    return compare(now, pooled, max_drift=config.max_drift, min_count=config.min_gold)


def check_drift(cycle: Cycle, progress: Progress) -> Ending | None:
    """Say what moved, in the log and in the stage's row. An Ending where the cycle is to stop for it."""
    if not (found := drifts_of(cycle.store, cycle.id)):
        return None
    told = f"the critic answers otherwise than in earlier cycles: {'; '.join(map(str, found))}"
    logger.warning("event=critic_drifted cycle=%s drifts=%r", cycle.id, told)
    progress.say(told)
    progress.flush()
    if cycle.config.critic.on_drift == "stop":
        return Ending("stopped", f"{told}; critic.on_drift = stop ends the cycle before training")
    return None


def compare(now: dict[str, Count], earlier: dict[str, Count], *, max_drift: float, min_count: int) -> tuple[Drift, ...]:
    """The shares that differ by more than `max_drift` and whose intervals at LEVEL do not meet.

    Shares of fewer than `min_count` are not compared.
    """
    found = []
    for name, count in now.items():
        before = earlier[name]
        if min(count.of, before.of) < min_count:
            continue
        here, there = wilson(count.num, count.of, LEVEL), wilson(before.num, before.of, LEVEL)
        rate, rate_before = count.num / count.of, before.num / before.of
        apart = here.low > there.high or here.high < there.low
        if apart and abs(rate - rate_before) > max_drift:
            found.append(Drift(name, rate, rate_before, count.of, before.of))
    return tuple(found)


def _counts(store: Store, cycle_id: str) -> dict[str, Count]:
    answers = count_answers(store, cycle_id)
    gold = (latest_audit(store, cycle_id) or {}).get("agreement", {})
    num_sided = int(gold.get("num_pairs", 0)) - int(gold.get("num_ties", 0))
    num_decided = int(gold.get("num_decided", 0))
    return {
        "first_won": Count(answers.num_first, answers.num_both),
        "unreadable": Count(answers.num_unreadable, answers.num_asked),
        "gold_agreed": Count(int(gold.get("num_agreed", 0)), num_decided),
        "gold_decided": Count(num_decided, num_sided),
    }


def _config_of(store: Store, cycle_id: str) -> CriticConfig | None:
    row = store.one("SELECT config FROM cycles WHERE id = ?", (cycle_id,))
    try:
        return None if row is None else CriticConfig.model_validate(json.loads(row["config"]).get("critic"))
    except ValidationError:
        return None


def _earlier(store: Store, cycle_id: str) -> Sequence[str]:
    rows = store.query("SELECT id FROM cycles WHERE id < ? AND ended_at IS NOT NULL ORDER BY id DESC", (cycle_id,))
    return [row["id"] for row in rows]


def _ground(store: Store, cycle_id: str) -> tuple[str, bool, frozenset[str]]:
    """Settings, sabotage and wordings: cycles that differ in one of these have critics that may differ."""
    row = store.one("SELECT config FROM cycles WHERE id = ?", (cycle_id,))
    assert row is not None
    is_inverted = bool(json.loads(row["config"]).get("fault_injection", {}).get("invert_critic"))
    return settings_of(row["config"]), is_inverted, rubrics_of(store, cycle_id)
