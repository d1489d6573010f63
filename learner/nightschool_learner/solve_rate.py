"""How often a task is solved, out of a few answers to it, and whether it is then worth practising. Pure functions.

Where somebody can say which answers are right, the solve rate is their share. Where nobody can, the answers vouch for
each other (self-consistency, arXiv 2203.11171): the rate is the share of the most frequent answer, and 0 where no two
agree. Answers that are wrong alike thus count as solved; practice learns nothing from these either, because it
compares what samples do differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nightschool_server.config.difficulty import ProbeConfig

from nightschool_learner.seed_records import KEPT

ALWAYS, NEVER = "always_solved", "never_solved"
"""States of tasks that the probe dropped."""


@dataclass(frozen=True)
class Answer:
    """What one sample of a probe came to."""

    said: str
    """Equal for answers that are the same; empty where there is none."""
    score: float | None = None
    """The application's opinion of it, where it has one."""


@dataclass(frozen=True)
class Estimate:
    """A task's solve rate."""

    solve_rate: float
    num_samples: int
    by: Literal["scorer", "agreement"]

    def verdict(self, config: ProbeConfig) -> str:
        """`kept`, `always_solved` or `never_solved`."""
        if self.solve_rate >= config.max_solve_rate:
            return ALWAYS
        return NEVER if self.solve_rate <= config.min_solve_rate else KEPT


def estimate_of(answers: Sequence[Answer], min_score: float) -> Estimate:
    """The solve rate: by score where every answer that was given has one, else by agreement."""
    given = [answer for answer in answers if answer.said]
    if given and all(answer.score is not None for answer in given):
        num_solved = sum(answer.score is not None and answer.score >= min_score for answer in given)
        return Estimate(num_solved / len(answers), len(answers), "scorer")
    [(_, most)] = Counter(answer.said for answer in given).most_common(1) or [("", 0)]
    return Estimate(most / len(answers) if most > 1 else 0.0, len(answers), "agreement")


def same_answer(text: str) -> str:
    """Equal for two final answers that say the same: without case, repeated spaces and a trailing period."""
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()
