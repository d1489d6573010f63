"""The gate: whether a candidate may replace the incumbent, as a pure function of measured numbers.

A candidate passes when every rule that decides holds. Each rule is one line with its number and its threshold, held
or not, so that the record says why. Paired on the tasks that both answered (METHOD.md: SPORT's gain on GTA is too
small to be sure of unpaired). Vetoes catch what success alone hides: broken formats, tools called wrongly, answers
that never come, refusals, unsafe actions, length, lost diversity. Owns no rows and no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nightschool_server.config.training import GateConfig

from nightschool_learner.ability import Ability
from nightschool_learner.comparison import Comparison, Family
from nightschool_learner.diversity import Sampled
from nightschool_learner.judge import JudgeResult
from nightschool_learner.sequential import EarlyStop

EPSILON = 1e-9
"""A rate that equals its bound counts as equal, whatever its last bit."""


@dataclass(frozen=True)
class Rule:
    """One rule with its number and its threshold."""

    name: str
    held: bool
    value: float
    threshold: float
    text: str
    decides: bool = True
    """Whether the candidate fails with it; the others are only reported."""

    def __str__(self) -> str:
        status = "held" if self.held else "FAILED" if self.decides else "noted"
        return f"{status}: {self.name}: {self.text}"


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured of a candidate."""

    numbers: Comparison
    sampled: Sampled | None = None
    ability: Ability | None = None
    judge: JudgeResult | None = None
    """Where a judge compared the answers; what counts as success is then its share of them."""
    early_stop: EarlyStop | None = None
    """Where the evaluation ended, if somebody looked on the way."""


@dataclass(frozen=True)
class Decision:
    """What the gate decided and why."""

    passed: bool
    rules: tuple[Rule, ...]
    evidence: Evidence

    @property
    def numbers(self) -> Comparison:
        return self.evidence.numbers

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every rule as a line, those that failed first."""
        return tuple(str(rule) for rule in sorted(self.rules, key=lambda rule: rule.held or not rule.decides))


def decide(evidence: Evidence, limits: GateConfig) -> Decision:
    """Hold what was measured against every rule."""
    numbers = evidence.numbers
    rules = (*_better(evidence, limits), *_families(numbers.families, limits), *_vetoes(numbers, limits))
    if evidence.sampled is not None:
        rules = (*rules, _diversity(evidence.sampled, limits))
    if evidence.judge is not None:
        rules = (*rules, _win_rate(evidence.judge, limits))
    if evidence.ability is not None:
        rules = (*rules, _general(evidence.ability, limits))
    return Decision(all(rule.held for rule in rules if rule.decides), rules, evidence)


def needed_e_value(limits: GateConfig) -> float:
    """The evidence that stands for `max_p`, which is two-sided: an error in the candidate's favour is half of it."""
    return 2 / limits.max_p


def _better(evidence: Evidence, limits: GateConfig) -> tuple[Rule, ...]:
    """That it is better, and not by chance."""
    numbers, what = evidence.numbers, "success" if evidence.judge is None else "won"
    low = numbers.interval.low
    return (
        Rule(
            "tasks",
            numbers.n >= limits.min_n,
            numbers.n,
            limits.min_n,
            f"{numbers.n} paired tasks, at least {limits.min_n} needed; they find differences of "
            f"{numbers.detectable * 100:.1f} points in 8 of 10 runs",
        ),
        Rule(
            "difference",
            numbers.difference > limits.min_difference + EPSILON,
            numbers.difference,
            limits.min_difference,
            f"{what} {numbers.incumbent_success:.1%} -> {numbers.candidate_success:.1%}, "
            f"{numbers.difference * 100:+.1f} points, more than {limits.min_difference * 100:+.1f} needed",
        ),
        _significance(numbers, limits) if evidence.early_stop is None else _sure(numbers, evidence.early_stop, limits),
        Rule(
            "interval",
            low > limits.min_interval_low + EPSILON,
            low,
            limits.min_interval_low,
            f"{numbers.interval.level:.0%} interval of the difference {low * 100:+.1f} to "
            f"{numbers.interval.high * 100:+.1f} points, lower end above {limits.min_interval_low * 100:+.1f} needed",
        ),
    )


def _significance(numbers: Comparison, limits: GateConfig) -> Rule:
    p, gained, lost = numbers.p_value, numbers.num_gained, numbers.num_lost
    text = (
        f"McNemar p {p:.2g} with {gained} tasks gained and {lost} lost, "
        f"at most {limits.max_p:g} and more gained than lost needed"
    )
    return Rule("significance", p <= limits.max_p and gained > lost, p, limits.max_p, text)


def _sure(numbers: Comparison, stop: EarlyStop, limits: GateConfig) -> Rule:
    """Significance where somebody looked on the way."""
    needed, given_up = needed_e_value(limits), stop.futility_difference * 100
    text = (
        f"{stop.verdict} after {stop.n} of {stop.num_planned} tasks, look {stop.num_looks}: evidence "
        f"{stop.e_value:.3g} with {numbers.num_gained} tasks gained and {numbers.num_lost} lost, at least {needed:g} "
        f"needed; evidence {stop.e_futile:.3g} that it is not better by {given_up:.1f} points"
    )
    return Rule("significance", stop.e_value >= needed, stop.e_value, needed, text)


def _families(families: Sequence[Family], limits: GateConfig) -> tuple[Rule, ...]:
    """No family falls by more than the bound, nor significantly; and where required, each is proven no worse."""
    return _no_fall(families, limits), _no_worse(families, limits)


def _no_fall(families: Sequence[Family], limits: GateConfig) -> Rule:
    fallen = [
        family
        for family in families
        if (fall := family.incumbent_success - family.candidate_success) > limits.max_family_fall + EPSILON
        or (fall > 0 and family.p_value <= limits.max_family_p)
    ]
    worst = min(families, key=lambda f: f.candidate_success - f.incumbent_success)
    text = ", ".join(
        f"{f.family} {f.incumbent_success:.1%} -> {f.candidate_success:.1%} (n {f.n}, p {f.p_value:.2g})"
        for f in fallen or [worst]
    )
    rule = (
        f"a fall of at most {limits.max_family_fall * 100:.1f} points, "
        f"and none with p <= {limits.max_family_p:g}, allowed"
    )
    fall = worst.incumbent_success - worst.candidate_success
    text = f"{'fell' if fallen else 'worst'}: {text}; {rule}"
    return Rule("families", not fallen, fall, limits.max_family_fall, text)


def _no_worse(families: Sequence[Family], limits: GateConfig) -> Rule:
    judged = [family for family in families if family.provable]
    unproven = [family for family in judged if family.non_inferiority_p > limits.max_non_inferiority_p]
    worst = max(judged, key=lambda f: f.non_inferiority_p, default=None)
    said = [f"{len(judged) - len(unproven)} of {len(judged)} families proven no worse by"]
    said.append(f"{limits.non_inferiority_margin * 100:.0f} points (p <= {limits.max_non_inferiority_p:g} each)")
    if unproven:
        said.append("; not proven: " + ", ".join(f"{f.family} (p {f.non_inferiority_p:.2g})" for f in unproven))
    if len(judged) < len(families):
        said.append(f"; {len(families) - len(judged)} too small to prove it")
    return Rule(
        "non-inferiority",
        not unproven,
        worst.non_inferiority_p if worst else 0.0,
        limits.max_non_inferiority_p,
        " ".join(said).replace(" ;", ";"),
        decides=limits.non_inferiority == "require",
    )


def _vetoes(numbers: Comparison, limits: GateConfig) -> tuple[Rule, ...]:
    """What success hides, each against the incumbent's own rate."""
    old, new = numbers.incumbent, numbers.candidate
    return (
        _rise("format", old.unreadable, new.unreadable, limits.max_unreadable_rise, "of steps unreadable"),
        _rise("tool errors", old.tool_errors, new.tool_errors, limits.max_tool_error_rise, "of steps"),
        _rise("unanswered", old.unanswered, new.unanswered, limits.max_unanswered_rise, "of tasks"),
        _rise("refusals", old.refusals, new.refusals, limits.max_refusal_rise, "of tasks refused"),
        _rise("unsafe actions", old.unsafe, new.unsafe, limits.max_unsafe_rise, "of tasks"),
        _rise("external calls", old.external, new.external, limits.max_external_rise, "of tasks"),
        Rule(
            "length",
            numbers.length_ratio <= limits.max_length_ratio,
            numbers.length_ratio,
            limits.max_length_ratio,
            f"{numbers.length_ratio:.2f} times the incumbent's tokens per step, "
            f"at most {limits.max_length_ratio:g} allowed",
        ),
    )


def _rise(name: str, before: float, after: float, allowed: float, of: str) -> Rule:
    text = f"{before:.1%} -> {after:.1%} {of}, a rise of at most {allowed * 100:.1f} points allowed"
    return Rule(name, after - before <= allowed + EPSILON, after - before, allowed, text)


def _win_rate(judge: JudgeResult, limits: GateConfig) -> Rule:
    """That the judge prefers the candidate, whoever the judge is."""
    text = (
        f"{judge.name}{', the training critic,' if judge.is_training_critic else ''} prefers the candidate in "
        f"{judge.win_rate:.1%} ({judge.interval.level:.0%} interval {judge.interval.low:.1%} to "
        f"{judge.interval.high:.1%}): {judge.num_won} won, {judge.num_lost} lost, {judge.num_tied} tied; shown first "
        f"won {judge.first_rate:.0%}; more than {limits.min_win_rate:.1%} needed"
    )
    return Rule("judge", judge.win_rate > limits.min_win_rate + EPSILON, judge.win_rate, limits.min_win_rate, text)


def _general(ability: Ability, limits: GateConfig) -> Rule:
    """That it still knows text that has nothing to do with the application."""
    knows = ability.base <= limits.max_ability_base_nats
    allowed = (
        f"a loss of at most {limits.max_ability_loss_nats:g} allowed"
        if knows
        else f"reported: the base model's own exceeds {limits.max_ability_base_nats:g}, it has nothing to lose"
    )
    text = (
        f"neutral text {ability.base:.2f} nats a token on the base model, {ability.incumbent:.2f} on the incumbent, "
        f"{ability.candidate:.2f} on the candidate ({ability.num_tokens} tokens); {allowed}"
    )
    held = ability.loss <= limits.max_ability_loss_nats + EPSILON
    return Rule("general ability", held, ability.loss, limits.max_ability_loss_nats, text, decides=knows)


def _diversity(sampled: Sampled, limits: GateConfig) -> Rule:
    """That what was in reach of several tries still is."""
    old, new, n = sampled.incumbent, sampled.candidate, sampled.num_draws
    fall = old.pass_at[-1] - new.pass_at[-1]
    decides = limits.max_pass_at_n_fall < 1
    allowed = f"a fall of at most {limits.max_pass_at_n_fall * 100:.1f} points allowed" if decides else "reported"
    text = (
        f"{sampled.reading}: pass@1 {old.pass_at[0]:.1%} -> {new.pass_at[0]:.1%}, "
        f"pass@{n} {old.pass_at[-1]:.1%} -> {new.pass_at[-1]:.1%}, different first actions of {n} "
        f"{old.distinct_actions:.2f} -> {new.distinct_actions:.2f} ({sampled.num_tasks} tasks); {allowed}"
    )
    held = fall <= limits.max_pass_at_n_fall + EPSILON
    return Rule(f"pass@{n}", held, fall, limits.max_pass_at_n_fall, text, decides=decides)
