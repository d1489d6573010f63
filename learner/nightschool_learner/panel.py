"""The panel: which component of a critic decides a duel of two candidates that ran.

`learner.critic.kinds` names the components in order. Facts have spoken before anybody here is asked. Then the first
component that is sure decides; one that abstains passes the duel on. A component in `learner.critic.vetoes` is asked
about every decision of another one: where it is sure of the contrary, nobody wins. Where all abstain, nobody wins, for
the reason of the first that gave one.

Owns the seam `Component`, the order, the vetoes, and the components that need no model. The judge's answers are
`critics.py`'s, feedback `feedback.py`'s, the application's scorer runs in `scoring.py`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nightschool_learner.critique import Abstention, Compare, Contender, Context, Duel, in_both_orders
from nightschool_learner.prompts import CandidateView


@dataclass(frozen=True)
class Case:
    """A step on which somebody has to decide."""

    context: Context
    views: Mapping[int, CandidateView]
    """By position, of every candidate."""
    contenders: Mapping[int, Contender]
    compare: Compare
    """The judge's comparisons in one order, behind the rows."""
    scores: dict[tuple[str, int], float | None] = field(default_factory=dict)
    """What a component found of a candidate, by its name and the position: one look is enough for several duels."""


class Component(Protocol):
    """One source of opinions."""

    @property
    def name(self) -> str:
        """As in `learner.critic.kinds`."""
        ...

    async def meet(self, case: Case, a: int, b: int) -> Duel:
        """Which of the candidates at `a` and `b` is better; no winner where this component cannot be sure."""
        ...


@dataclass(frozen=True)
class JudgeComponent:
    """The model: the same winner in both orders by the margin."""

    margin_nats: float
    name: str = "judge"

    async def meet(self, case: Case, a: int, b: int) -> Duel:
        return await in_both_orders(a, b, case.compare, self.margin_nats)


Score = Callable[[Case, int], Awaitable[float | None]]
"""How good the candidate at a position is; None where that cannot be said."""


@dataclass(frozen=True)
class ScoreComponent:
    """Anything that scores candidates one by one: the higher score wins where it is higher by `margin`."""

    name: str
    margin: float
    score: Score

    async def meet(self, case: Case, a: int, b: int) -> Duel:
        of_a, of_b = [await self._score(case, position) for position in (a, b)]
        if of_a is None or of_b is None:
            return Duel(None, "silent", component=self.name)
        difference = of_a - of_b
        if abs(difference) < self.margin:
            return Duel(None, "margin", component=self.name)
        return Duel(a if difference > 0 else b, margin=abs(difference), component=self.name)

    async def _score(self, case: Case, position: int) -> float | None:
        key = (self.name, position)
        if key not in case.scores:
            case.scores[key] = await self.score(case, position)
        return case.scores[key]


async def consistency(case: Case, position: int) -> float:
    """The log of how many samples said this, half of one added so that odds of few samples stay small."""
    return math.log(case.contenders[position].num_samples + 0.5)


@dataclass(frozen=True)
class Panel:
    """The components of a cycle's critic."""

    components: Sequence[Component]
    vetoes: Sequence[Component] = ()

    async def decide(self, case: Case, a: int, b: int) -> Duel:
        """The duel of two candidates that ran."""
        reason: Abstention = ""
        for component in self.components:
            duel = await component.meet(case, a, b)
            if duel.winner is not None:
                return await self._unless_vetoed(case, duel, a, b)
            if duel.why != "silent":
                reason = reason or duel.why
        return Duel(None, reason or "silent", component="")

    async def _unless_vetoed(self, case: Case, duel: Duel, a: int, b: int) -> Duel:
        for component in self.vetoes:
            if component.name == duel.component:
                continue
            objection = await component.meet(case, a, b)
            if objection.winner not in (None, duel.winner):
                return Duel(None, "veto", objection.margin, component.name)
        return duel
