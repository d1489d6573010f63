"""What a night came to, out of the home's rows: success, families, diversity, pairs, critic, seconds, tokens.

Reads only. The numbers are the learner's own (`comparison.py`, `diversity.py`, its report); here they are put beside
each other, and families are corrected for there being several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nightschool_learner.comparison import Comparison, Terms, compare, paired
from nightschool_learner.diversity import Sampled, sampled_numbers
from nightschool_learner.evaluation_records import EvaluationRow, evaluation_of
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, results_of
from nightschool_learner.records import active_adapter
from nightschool_learner.report.contents import Report
from nightschool_learner.report.gather import build
from nightschool_learner.statistics import wilson
from nightschool_server.engine import BASE
from nightschool_server.store.store import Store

from bench.nights.truth import Pictures, accuracy, pair_verdicts

ALPHA = 0.05
"""At which a family has fallen, all families of a comparison together."""
TERMS = Terms(level=0.95, seed=0, alpha=0.01, margin=0.15, margin_p=ALPHA)


@dataclass(frozen=True)
class Success:
    """Of one adapter's greedy answers to the held-out tasks."""

    rate: float
    n: int
    low: float
    """Wilson, 95%."""
    high: float


@dataclass(frozen=True)
class FamilyChange:
    """One family of held-out tasks on two adapters."""

    n: int
    before: float
    after: float
    p: float
    """Exact McNemar, two-sided, of this family alone."""
    adjusted_p: float
    """Holm, over the families of this comparison."""


@dataclass(frozen=True)
class Spread:
    """Several sampled answers to each task, on two adapters from the same seeds."""

    num_tasks: int
    num_draws: int
    pass_at_1: tuple[float, float]
    """Before, after."""
    pass_at_n: tuple[float, float]
    pass_at_n_change: tuple[float, float]
    """95% bootstrap interval of the difference, whole tasks resampled."""
    distinct_actions: tuple[float, float]
    """Different first actions of a task over its draws, mean over tasks; 1 is the least."""
    reading: str


@dataclass(frozen=True)
class Change:
    """One adapter against another on the same tasks."""

    against: str
    difference: float
    low: float
    """95% bootstrap interval of the difference, paired by task."""
    high: float
    p: float
    """Exact McNemar, two-sided."""
    num_gained: int
    num_lost: int
    fallen: tuple[str, ...]
    """Families that fell with an adjusted p below ALPHA."""
    families: Mapping[str, FamilyChange]
    spread: Spread | None


@dataclass(frozen=True)
class Night:
    """One cycle and what it left behind."""

    seed: int
    state: str
    outcome: str
    incumbent: str
    candidate: str | None
    candidate_success: Success | None
    """None where the cycle ended before anybody was trained, or measured."""
    candidate_change: Change | None
    """Against the incumbent."""
    candidate_missed: tuple[str, ...]
    """Held-out tasks that its greedy answer did not solve, so that rows can be paired."""
    gate_failed: tuple[str, ...]
    active: str
    """The adapter that serves afterwards."""
    active_success: Success | None
    against_base: Change | None
    """The active adapter's; None where it is the base, or was not measured."""
    pairs: int
    pair_verdicts: Mapping[str, int]
    """Held against the shop's rules, see `truth.py`."""
    pair_accuracy: float | None
    critic: Mapping[str, Any]
    practice: Mapping[str, Any]
    seconds: Mapping[str, float]
    """By stage, and of the whole cycle as `cycle`."""
    tokens: Mapping[str, int]
    """Written, and what the critic read as `critic_prompts`."""
    training: Mapping[str, Any]
    """Pairs, steps, alarms, and the metrics' means over the last quarter of the steps."""


def night_of(store: Store, cycle_id: str, pictures: Pictures) -> Night:
    """Everything about one cycle."""
    report, decision = build(store, cycle_id), evaluation_of(store, cycle_id)
    known = _Known(store)
    facts, active = report.cycle, active_adapter(store)
    incumbent, candidate = facts.incumbent or BASE, facts.candidate
    verdicts = pair_verdicts(store, cycle_id, pictures)
    return Night(
        seed=facts.seed,
        state=facts.state,
        outcome=facts.outcome,
        incumbent=incumbent,
        candidate=candidate,
        candidate_success=known.success(candidate) if candidate else None,
        candidate_change=known.change(incumbent, candidate) if candidate else None,
        candidate_missed=known.missed(candidate) if candidate else (),
        gate_failed=_failed(decision),
        active=active,
        active_success=known.success(active),
        against_base=known.change(BASE, active) if active != BASE else None,
        pairs=sum(verdicts.values()),
        pair_verdicts=verdicts,
        pair_accuracy=accuracy(verdicts),
        critic=_critic(report),
        practice=asdict(report.practice),
        seconds=_seconds(report),
        tokens=_tokens(report),
        training=_training(report),
    )


class _Known:
    """The answers to held-out tasks that the home holds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        rows = store.query("SELECT DISTINCT set_digest, protocol FROM evaluation_results")
        assert len(rows) <= 1, "one home measures one set of tasks in one way"
        self._basis = Basis(**rows[0]) if rows else None

    def results(self, adapter: str) -> list[TaskResult]:
        return list(results_of(self._store, self._basis, adapter).values()) if self._basis else []

    def success(self, adapter: str) -> Success | None:
        solved = [result.success for result in _greedy(self.results(adapter))]
        if not solved:
            return None
        interval = wilson(sum(solved), len(solved))
        return Success(sum(solved) / len(solved), len(solved), interval.low, interval.high)

    def missed(self, adapter: str) -> tuple[str, ...]:
        return tuple(sorted(result.task_id for result in _greedy(self.results(adapter)) if not result.success))

    def change(self, before: str, after: str) -> Change | None:
        old, new = self.results(before), self.results(after)
        if not _greedy(old) or not _greedy(new):
            return None
        found = compare(paired(_greedy(old), _greedy(new)), TERMS)
        sampled = sampled_numbers(old, new, temperature=1.0, level=TERMS.level, seed=TERMS.seed)
        return change_of(before, found, sampled)


def change_of(against: str, found: Comparison, sampled: Sampled | None) -> Change:
    """A comparison as a row of the table holds it."""
    adjusted = holm({family.family: family.p_value for family in found.families})
    families = {
        family.family: FamilyChange(
            family.n, family.incumbent_success, family.candidate_success, family.p_value, adjusted[family.family]
        )
        for family in found.families
    }
    return Change(
        against=against,
        difference=found.difference,
        low=found.interval.low,
        high=found.interval.high,
        p=found.p_value,
        num_gained=found.num_gained,
        num_lost=found.num_lost,
        fallen=tuple(
            name for name, family in families.items() if family.after < family.before and family.adjusted_p < ALPHA
        ),
        families=families,
        spread=_spread(sampled) if sampled is not None else None,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the k-th smallest of m p-values times m - k + 1, never falling, at most 1.

    Rejecting what is below alpha keeps the chance of any false rejection below alpha (Holm 1979).
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = least
    return adjusted


def _greedy(results: Sequence[TaskResult]) -> list[TaskResult]:
    return [result for result in results if result.draw == GREEDY]


def _spread(sampled: Sampled) -> Spread:
    old, new = sampled.incumbent, sampled.candidate
    return Spread(
        num_tasks=sampled.num_tasks,
        num_draws=sampled.num_draws,
        pass_at_1=(old.pass_at[0], new.pass_at[0]),
        pass_at_n=(old.pass_at[-1], new.pass_at[-1]),
        pass_at_n_change=(sampled.pass_at_n.low, sampled.pass_at_n.high),
        distinct_actions=(old.distinct_actions, new.distinct_actions),
        reading=sampled.reading,
    )


def _failed(decision: EvaluationRow | None) -> tuple[str, ...]:
    return tuple(rule.name for rule in decision.rules if rule.decides and not rule.held) if decision else ()


def _critic(report: Report) -> dict[str, Any]:
    figures, audited = report.critic, (report.critic_audit or {}).get("agreement", {})
    kept = ("num_pairs", "num_decided", "num_agreed", "rate", "agreement", "kappa", "abstention_rate")
    return {
        "comparisons": figures.num_comparisons,
        "invalid": figures.num_invalid,
        "decided_by": figures.decided_by,
        "undecided": figures.undecided,
        "gold": {name: audited[name] for name in kept if name in audited},
    }


def _seconds(report: Report) -> dict[str, float]:
    found = {stage.name: stage.seconds for stage in report.stages if stage.seconds is not None}
    if report.cycle.started_at and report.cycle.ended_at:
        found["cycle"] = report.cycle.ended_at - report.cycle.started_at
    return {name: round(seconds, 1) for name, seconds in found.items()}


def _tokens(report: Report) -> dict[str, int]:
    written = {use.role: use.written for use in report.tokens}
    return written | {"critic_prompts": report.critic.prompt_tokens}


def _training(report: Report) -> dict[str, Any]:
    training = report.training
    if training is None:
        return {}
    means = {name: round(value, 4) for name, value in training.final.items()}
    return {"pairs": training.num_pairs, "steps": training.num_steps, "alarms": training.alarms, "means": means}
