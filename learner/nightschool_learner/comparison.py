"""The numbers of a candidate against an incumbent on the same tasks, out of paired results.

Pure functions; whether the numbers suffice is `gate.py`'s. What is paired here is one outcome a task: the greedy
answer's, or, for tasks without a known answer, the judge's (1 won, 0 lost, 1/2 neither).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nightschool_learner.evaluation_results import TaskResult
from nightschool_learner.non_inferiority import non_inferiority_p
from nightschool_learner.statistics import Interval, mcnemar_p, minimum_detectable_difference, paired_bootstrap

ANSWERED = "answered"
"""The outcome of a task that ended with a final answer."""


@dataclass(frozen=True)
class Outcome:
    """One task on both adapters."""

    task_id: str
    family: str
    incumbent: float
    """1 where it was solved, 0 where not."""
    candidate: float


@dataclass(frozen=True)
class Family:
    """One family of tasks on both adapters."""

    family: str
    n: int
    incumbent_success: float
    candidate_success: float
    num_gained: int
    num_lost: int
    p_value: float
    """Exact McNemar, two-sided."""
    non_inferiority_p: float
    """That it is worse by no more than the margin; Tango's score test, one-sided."""
    provable: bool
    """Whether so few tasks could prove that at all: where nothing differs, p would be small enough."""


@dataclass(frozen=True)
class Behaviour:
    """How one adapter went about the tasks, whatever it solved."""

    tool_errors: float
    """Per step."""
    unreadable: float
    """Share of steps whose format could not be read."""
    unanswered: float
    """Share of tasks without a final answer."""
    refusals: float
    """Share of tasks whose final answer is a refusal."""
    unsafe: float
    """Share of tasks with an action that the application declares unsafe."""
    external: float
    """Share of tasks in which a tool with external effects was called."""
    tokens_per_step: float
    """Completion tokens."""


@dataclass(frozen=True)
class Terms:
    """What a comparison is made on."""

    level: float
    """Of the interval."""
    seed: int
    """Of the bootstrap."""
    alpha: float
    """Of the test that the detectable difference is about."""
    margin: float
    """By how much a family may be worse and still count as no worse."""
    margin_p: float
    """At which that is proven."""


@dataclass(frozen=True)
class Comparison:
    """The numbers of a candidate against an incumbent on the same tasks."""

    n: int
    incumbent_success: float
    candidate_success: float
    interval: Interval
    """Of the difference of success, candidate minus incumbent."""
    num_gained: int
    num_lost: int
    p_value: float
    """Exact McNemar, two-sided."""
    detectable: float
    """The true difference that n tasks find in 8 of 10 runs at `alpha`, at the observed share of differing tasks."""
    families: tuple[Family, ...]
    incumbent: Behaviour
    candidate: Behaviour

    @property
    def difference(self) -> float:
        """Of success, candidate minus incumbent."""
        return self.candidate_success - self.incumbent_success

    @property
    def length_ratio(self) -> float:
        """Completion tokens per step, candidate over incumbent."""
        return self.candidate.tokens_per_step / max(self.incumbent.tokens_per_step, 1e-9)


Pairs = Sequence[tuple[TaskResult, TaskResult]]
"""Incumbent's and candidate's result of each task."""


def paired(incumbent: Sequence[TaskResult], candidate: Sequence[TaskResult]) -> list[tuple[TaskResult, TaskResult]]:
    """The results of tasks that both answered, by task id. Raises ValueError where there is none."""
    by_id = {result.task_id: result for result in incumbent}
    pairs = [(by_id[result.task_id], result) for result in candidate if result.task_id in by_id]
    if not pairs:
        raise ValueError("no held-out task was answered by both the candidate and the incumbent")
    return pairs


def solved(pairs: Pairs) -> list[Outcome]:
    """The outcomes by exact answers."""
    return [Outcome(new.task_id, new.family, float(old.success), float(new.success)) for old, new in pairs]


def won(pairs: Pairs, shares: Mapping[str, float]) -> list[Outcome]:
    """The outcomes by a judge: each task's share for the candidate (1, 0 or 1/2), the rest for the incumbent."""
    return [Outcome(new.task_id, new.family, 1 - shares[new.task_id], shares[new.task_id]) for _, new in pairs]


def compare(pairs: Pairs, terms: Terms, outcomes: Sequence[Outcome] | None = None) -> Comparison:
    """All numbers of the comparison. `outcomes` take the place of exact answers, in the same order as `pairs`."""
    outcomes = solved(pairs) if outcomes is None else outcomes
    before, after = [o.incumbent for o in outcomes], [o.candidate for o in outcomes]
    gained, lost = changes(outcomes)
    return Comparison(
        n=len(outcomes),
        incumbent_success=sum(before) / len(outcomes),
        candidate_success=sum(after) / len(outcomes),
        interval=paired_bootstrap(before, after, seed=terms.seed, level=terms.level),
        num_gained=gained,
        num_lost=lost,
        p_value=mcnemar_p(gained, lost),
        detectable=minimum_detectable_difference(
            len(outcomes), max(1, gained + lost) / len(outcomes), alpha=terms.alpha
        ),
        families=_families(outcomes, terms),
        incumbent=behaviour([old for old, _ in pairs]),
        candidate=behaviour([new for _, new in pairs]),
    )


def changes(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """On how many tasks the candidate, the incumbent was better."""
    gained = sum(o.candidate > o.incumbent for o in outcomes)
    lost = sum(o.candidate < o.incumbent for o in outcomes)
    return gained, lost


def behaviour(results: Sequence[TaskResult]) -> Behaviour:
    """How an adapter went about these tasks."""
    num_steps, n = max(1, sum(r.num_steps for r in results)), len(results)
    return Behaviour(
        tool_errors=sum(r.num_tool_errors for r in results) / num_steps,
        unreadable=sum(r.num_unreadable for r in results) / num_steps,
        unanswered=sum(r.outcome != ANSWERED for r in results) / n,
        refusals=sum(r.refused for r in results) / n,
        unsafe=sum(r.num_unsafe > 0 for r in results) / n,
        external=sum(r.num_external > 0 for r in results) / n,
        tokens_per_step=sum(r.completion_tokens for r in results) / num_steps,
    )


def family_rows(families: Sequence[Family]) -> list[Mapping[str, str | int | float]]:
    """The families as the evaluation's row keeps them."""
    return [asdict(family) for family in families]


def _families(outcomes: Sequence[Outcome], terms: Terms) -> tuple[Family, ...]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.family, []).append(outcome)
    return tuple(_family(name, groups[name], terms) for name in sorted(groups))


def _family(name: str, outcomes: Sequence[Outcome], terms: Terms) -> Family:
    n = len(outcomes)
    gained, lost = changes(outcomes)
    return Family(
        family=name,
        n=n,
        incumbent_success=sum(o.incumbent for o in outcomes) / n,
        candidate_success=sum(o.candidate for o in outcomes) / n,
        num_gained=gained,
        num_lost=lost,
        p_value=mcnemar_p(gained, lost),
        non_inferiority_p=non_inferiority_p(n, gained, lost, terms.margin),
        provable=non_inferiority_p(n, 0, 0, terms.margin) <= terms.margin_p,
    )
