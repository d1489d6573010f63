"""What the gate is given: the numbers over what was measured, on all tasks or on those up to a look.

The evaluate stage asks at every look whether the outcome is sure; the decision asks the same questions of the rows
again, so both come to the same end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nightschool_server.config.training import GateConfig

from nightschool_learner.comparison import Comparison, Terms, compare, paired, won
from nightschool_learner.diversity import sampled_numbers
from nightschool_learner.evaluation_results import Basis, Key, TaskResult
from nightschool_learner.gate import Evidence, decide, needed_e_value
from nightschool_learner.held_out import Plan, power_of
from nightschool_learner.judge import JudgeResult, judged, shares_of
from nightschool_learner.sequential import (
    Counts,
    EarlyStop,
    Verdict,
    confidence_sequence,
    evidence_above,
    evidence_below,
)
from nightschool_learner.stages import Cycle


@dataclass(frozen=True)
class Measured:
    """The results of both adapters, by task and draw."""

    incumbent: Mapping[Key, TaskResult]
    candidate: Mapping[Key, TaskResult]

    def has(self, keys: list[Key]) -> bool:
        """Whether both answered all of these."""
        return all(key in self.incumbent and key in self.candidate for key in keys)


def evidence_of(cycle: Cycle, basis: Basis, plan: Plan, measured: Measured) -> Evidence | None:
    """The evidence at the end of the evaluation, early or not; None where results are missing."""
    for number, n in enumerate(plan.looks, start=1):
        if not measured.has(plan.greedy(n)):
            return None
        stop = look_at(cycle, basis, plan, measured, number)
        if stop is not None or n == plan.n:
            needed = plan.greedy(n) if stop is not None and stop.verdict == "futile" else plan.keys(n)
            return _evidence(cycle, plan, measured, n, stop) if measured.has(needed) else None
    raise AssertionError("the last look is at all tasks")


def look_at(cycle: Cycle, basis: Basis, plan: Plan, measured: Measured, number: int) -> EarlyStop | None:
    """Whether the evaluation may end at look `number` (from 1); None goes on, or ends it where nobody is to look."""
    limits, n = cycle.config.gate, plan.looks[number - 1]
    if not limits.early_stop:
        return None
    numbers = _numbers(cycle, plan, measured, n)
    counts = _counts(numbers)
    bound = limits.futility_difference or power_of(cycle, basis, plan.n).detectable
    better, hopeless = evidence_above(counts, 0.0), evidence_below(counts, bound)

    def ended(verdict: Verdict) -> EarlyStop:
        return EarlyStop(verdict, n, plan.n, number, better, hopeless, bound)

    if hopeless >= 1 / limits.max_futility_error:
        return ended("futile")
    if n == plan.n:
        return ended("complete")
    if better < needed_e_value(limits):
        return None
    accepted = ended("accepted")
    # Sampled answers come after the last look and may still veto.
    return accepted if decide(Evidence(numbers, early_stop=accepted), limits).passed else None


def terms_of(limits: GateConfig, seed: int) -> Terms:
    """What the gate compares on."""
    return Terms(limits.interval_level, seed, limits.max_p, limits.non_inferiority_margin, limits.max_non_inferiority_p)


def _evidence(cycle: Cycle, plan: Plan, measured: Measured, n: int, stop: EarlyStop | None) -> Evidence:
    keys = plan.keys(n)
    sampled = sampled_numbers(
        [measured.incumbent[key] for key in keys if key in measured.incumbent],
        [measured.candidate[key] for key in keys if key in measured.candidate],
        temperature=cycle.config.evaluate.temperature,
        level=cycle.config.gate.interval_level,
        seed=cycle.seed,
    )
    return Evidence(
        _numbers(cycle, plan, measured, n), sampled, judge=_judge(cycle, plan, measured, n), early_stop=stop
    )


def _judge(cycle: Cycle, plan: Plan, measured: Measured, n: int) -> JudgeResult | None:
    return judged(cycle, shares_of(cycle, _pairs(plan, measured, n))) if plan.is_judged else None


def _pairs(plan: Plan, measured: Measured, n: int) -> list[tuple[TaskResult, TaskResult]]:
    keys = plan.greedy(n)
    return paired([measured.incumbent[key] for key in keys], [measured.candidate[key] for key in keys])


def _numbers(cycle: Cycle, plan: Plan, measured: Measured, n: int) -> Comparison:
    limits, pairs = cycle.config.gate, _pairs(plan, measured, n)
    outcomes = won(pairs, shares_of(cycle, pairs)) if plan.is_judged else None
    numbers = compare(pairs, terms_of(limits, cycle.seed), outcomes)
    if not limits.early_stop:
        return numbers
    # p and interval of a fixed number of tasks do not hold at a look; these hold at every one.
    counts = _counts(numbers)
    anytime_p = min(1.0, 2 / max(evidence_above(counts, 0.0), evidence_below(counts, 0.0)))
    return replace(numbers, interval=confidence_sequence(counts, limits.interval_level), p_value=anytime_p)


def _counts(numbers: Comparison) -> Counts:
    return Counts(numbers.num_gained, numbers.num_lost, numbers.n - numbers.num_gained - numbers.num_lost)
