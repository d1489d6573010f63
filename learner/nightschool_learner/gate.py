"""The gate: whether a candidate may replace the incumbent, as a pure function of paired results.

A candidate passes when every rule holds. Each rule is one line with its number and its threshold, held or
not, so that the record says why. Paired on the tasks that both answered (METHOD.md: SPORT's gain on GTA is too
small to be sure of unpaired). Vetoes catch what success alone hides: tools called wrongly, answers that never
come, length. Owns no rows and no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nightschool_server.config.training import GateConfig

from nightschool_learner.evaluation_records import TaskResult
from nightschool_learner.statistics import Interval, mcnemar_p, minimum_detectable_difference, paired_bootstrap

ANSWERED = "answered"
"""The outcome of a task that ended with a final answer."""

EPSILON = 1e-9
"""A rate that equals its bound counts as equal, whatever its last bit."""


@dataclass(frozen=True)
class Family:
    """One family of tasks on both adapters."""

    family: str
    n: int
    incumbent_success: float
    candidate_success: float
    p_value: float


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
    """The true difference that n tasks find in 8 of 10 runs at p 0.05, at the observed share of differing tasks."""
    families: tuple[Family, ...]
    incumbent_errors: float
    """Tool errors per step."""
    candidate_errors: float
    incumbent_unanswered: float
    """Share of tasks without a final answer."""
    candidate_unanswered: float
    length_ratio: float
    """Completion tokens per step, candidate over incumbent."""

    @property
    def difference(self) -> float:
        """Of success, candidate minus incumbent."""
        return self.candidate_success - self.incumbent_success


@dataclass(frozen=True)
class Rule:
    """One rule with its number and its threshold."""

    name: str
    held: bool
    text: str

    def __str__(self) -> str:
        return f"{'held' if self.held else 'FAILED'}: {self.name}: {self.text}"


@dataclass(frozen=True)
class Decision:
    """What the gate decided and why."""

    passed: bool
    rules: tuple[Rule, ...]
    numbers: Comparison

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every rule as a line, those that failed first."""
        return tuple(str(rule) for rule in sorted(self.rules, key=lambda rule: rule.held))


def compare(incumbent: Sequence[TaskResult], candidate: Sequence[TaskResult], *, level: float, seed: int) -> Comparison:
    """Pair the results by task id; tasks that only one of the two answered are left out.

    Raises ValueError where no task pairs.
    """
    by_id = {result.task_id: result for result in incumbent}
    pairs = [(by_id[result.task_id], result) for result in candidate if result.task_id in by_id]
    if not pairs:
        raise ValueError("no held-out task was answered by both the candidate and the incumbent")
    before = [float(old.success) for old, _ in pairs]
    after = [float(new.success) for _, new in pairs]
    gained, lost = _changes(pairs)
    olds, news = [old for old, _ in pairs], [new for _, new in pairs]
    return Comparison(
        n=len(pairs),
        incumbent_success=sum(before) / len(pairs),
        candidate_success=sum(after) / len(pairs),
        interval=paired_bootstrap(before, after, seed=seed, level=level),
        num_gained=gained,
        num_lost=lost,
        p_value=mcnemar_p(gained, lost),
        detectable=minimum_detectable_difference(len(pairs), max(1, gained + lost) / len(pairs)),
        families=_families(pairs),
        incumbent_errors=_errors_per_step(olds),
        candidate_errors=_errors_per_step(news),
        incumbent_unanswered=_unanswered(olds),
        candidate_unanswered=_unanswered(news),
        length_ratio=_tokens_per_step(news) / max(_tokens_per_step(olds), 1e-9),
    )


def decide(numbers: Comparison, limits: GateConfig) -> Decision:
    """Hold the comparison against every rule."""
    low, p = numbers.interval.low, numbers.p_value
    errors = numbers.candidate_errors - numbers.incumbent_errors
    unanswered = numbers.candidate_unanswered - numbers.incumbent_unanswered
    rules = (
        Rule("tasks", numbers.n >= limits.min_n, f"{numbers.n} paired tasks, at least {limits.min_n} needed"),
        Rule(
            "difference",
            numbers.difference > limits.min_difference + EPSILON,
            f"success {numbers.incumbent_success:.1%} -> {numbers.candidate_success:.1%}, "
            f"{numbers.difference * 100:+.1f} points, more than {limits.min_difference * 100:+.1f} needed",
        ),
        Rule(
            "significance",
            p <= limits.max_p and numbers.num_gained > numbers.num_lost,
            f"McNemar p {p:.2g} with {numbers.num_gained} tasks gained and {numbers.num_lost} lost, "
            f"at most {limits.max_p:g} and more gained than lost needed",
        ),
        Rule(
            "interval",
            low > limits.min_interval_low + EPSILON,
            f"{numbers.interval.level:.0%} interval of the difference {low * 100:+.1f} to "
            f"{numbers.interval.high * 100:+.1f} points, lower end above {limits.min_interval_low * 100:+.1f} needed",
        ),
        _family_rule(numbers.families, limits),
        Rule(
            "tool errors",
            errors <= limits.max_tool_error_rise + EPSILON,
            f"{numbers.incumbent_errors:.1%} -> {numbers.candidate_errors:.1%} of steps, "
            f"a rise of at most {limits.max_tool_error_rise * 100:.1f} points allowed",
        ),
        Rule(
            "unanswered",
            unanswered <= limits.max_unanswered_rise + EPSILON,
            f"{numbers.incumbent_unanswered:.1%} -> {numbers.candidate_unanswered:.1%} of tasks, "
            f"a rise of at most {limits.max_unanswered_rise * 100:.1f} points allowed",
        ),
        Rule(
            "length",
            numbers.length_ratio <= limits.max_length_ratio,
            f"{numbers.length_ratio:.2f} times the incumbent's tokens per step, "
            f"at most {limits.max_length_ratio:g} allowed",
        ),
    )
    return Decision(all(rule.held for rule in rules), rules, numbers)


def _family_rule(families: Sequence[Family], limits: GateConfig) -> Rule:
    """No family falls by more than the bound, nor by any amount that is significant by itself."""
    fallen = [
        family
        for family in families
        if (fall := family.incumbent_success - family.candidate_success) > limits.max_family_fall + EPSILON
        or (fall > 0 and family.p_value <= limits.max_family_p)
    ]
    shown = fallen or sorted(families, key=lambda f: f.candidate_success - f.incumbent_success)[:1]
    text = ", ".join(
        f"{f.family} {f.incumbent_success:.1%} -> {f.candidate_success:.1%} (n {f.n}, p {f.p_value:.2g})" for f in shown
    )
    rule = (
        f"a fall of at most {limits.max_family_fall * 100:.1f} points, "
        f"and none with p <= {limits.max_family_p:g}, allowed"
    )
    return Rule("families", not fallen, f"{'fell' if fallen else 'worst'}: {text}; {rule}")


def _families(pairs: Sequence[tuple[TaskResult, TaskResult]]) -> tuple[Family, ...]:
    groups: dict[str, list[tuple[TaskResult, TaskResult]]] = {}
    for pair in pairs:
        groups.setdefault(pair[1].family, []).append(pair)
    return tuple(_family(name, groups[name]) for name in sorted(groups))


def _family(name: str, pairs: Sequence[tuple[TaskResult, TaskResult]]) -> Family:
    return Family(
        name,
        len(pairs),
        sum(old.success for old, _ in pairs) / len(pairs),
        sum(new.success for _, new in pairs) / len(pairs),
        mcnemar_p(*_changes(pairs)),
    )


def _changes(pairs: Sequence[tuple[TaskResult, TaskResult]]) -> tuple[int, int]:
    """How many tasks only the candidate, only the incumbent solved."""
    gained = sum(new.success and not old.success for old, new in pairs)
    lost = sum(old.success and not new.success for old, new in pairs)
    return gained, lost


def _errors_per_step(results: Sequence[TaskResult]) -> float:
    return sum(r.num_tool_errors for r in results) / max(1, sum(r.num_steps for r in results))


def _unanswered(results: Sequence[TaskResult]) -> float:
    return sum(r.outcome != ANSWERED for r in results) / len(results)


def _tokens_per_step(results: Sequence[TaskResult]) -> float:
    return sum(r.completion_tokens for r in results) / max(1, sum(r.num_steps for r in results))


def family_rows(families: Sequence[Family]) -> list[Mapping[str, str | int | float]]:
    """The families as the evaluation's row keeps them."""
    return [
        {
            "family": f.family,
            "n": f.n,
            "incumbent_success": f.incumbent_success,
            "candidate_success": f.candidate_success,
        }
        for f in families
    ]
