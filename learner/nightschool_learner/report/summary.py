"""The first lines of a report: what came of the cycle, and why, in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.gate import Rule
from nightschool_learner.judge import JudgeResult
from nightschool_learner.report.contents import Report
from nightschool_learner.report.words import RULES


@dataclass(frozen=True)
class Summary:
    """What came of a cycle."""

    state: str
    title: str
    because: tuple[str, ...]


def summary_of(report: Report) -> Summary:
    """The verdict and its reasons."""
    cycle, row = report.cycle, report.evaluation
    before, after = cycle.incumbent or "none", cycle.candidate or "none"
    if cycle.state == "promoted":
        title = f"Promoted: {after} took over from {before}, because it proved better."
        because = _measured(row)
    elif cycle.state == "rejected":
        title = f"Rejected: {before} stays. {after} did not prove better."
        because = (*_failed_rules(row), *_measured(row)) or (cycle.outcome,)
    elif cycle.state == "stopped":
        title = f"Stopped: {before} stays. The cycle ended before anything could be promoted."
        because = (cycle.outcome, *_measured(row))
    elif cycle.state == "cancelled":
        title = f"Cancelled: {before} stays."
        because = (f"Somebody ended it: {cycle.outcome}",)
    elif cycle.state == "failed":
        title = f"Failed: {before} stays. Something went wrong that is not the model's fault."
        because = (cycle.outcome,)
    else:
        title, because = f"This cycle is {cycle.state}.", ()
    alarms = report.training.alarms if report.training else ()
    return Summary(cycle.state, title, (*because, *(f"Alarm in training: {alarm}" for alarm in alarms)))


def points(share: float) -> str:
    """A difference of shares with its sign, in points."""
    return f"{share * 100:+.1f}"


def _measured(row: EvaluationRow | None) -> tuple[str, ...]:
    if row is None:
        return ()
    if row.judge:
        return (_preferred(row, row.judge), _rules(row))
    difference = row.candidate_success - row.incumbent_success
    return (
        f"Of {row.n} test tasks that neither training nor practice ever saw, the new adapter solved "
        f"{row.candidate_success:.1%}, the old one {row.incumbent_success:.1%}: {points(difference)} points "
        f"({row.interval_level:.0%} interval {points(row.interval_low)} to {points(row.interval_high)}).",
        f"It solved {row.num_gained} that the old one did not, and lost {row.num_lost}; "
        f"{_chance(row.p_value)}.",
        _rules(row),
    )  # fmt: skip


def _preferred(row: EvaluationRow, judge: JudgeResult) -> str:
    return (
        f"On {row.n} test tasks that neither training nor practice ever saw, a judge ({judge.name}) preferred the new "
        f"adapter's answer {judge.num_won} times, the old one's {judge.num_lost} times, and neither {judge.num_tied} "
        f"times; {_chance(row.p_value)}."
    )


def _rules(row: EvaluationRow) -> str:
    deciding = [rule.held for rule in row.rules if rule.decides]
    return f"{sum(deciding)} of {len(deciding)} rules that decide held."


def _chance(p: float) -> str:
    if p >= 0.01:
        return f"between equals, chance alone would differ as much {p:.0%} of the time"
    return f"between equals, chance alone would differ as much less than once in {_round(1 / p)} times"


def _round(times: float) -> str:
    return f"{int(times):,}" if times < 1e6 else "a million"


def _failed_rules(row: EvaluationRow | None) -> tuple[str, ...]:
    return (
        tuple(f'It failed the rule "{rule_title(rule).lower()}": {rule.text}.' for rule in row.rules if _failed(rule))
        if row
        else ()
    )


def _failed(rule: Rule) -> bool:
    return rule.decides and not rule.held


def rule_title(rule: Rule) -> str:
    """A rule's name in words."""
    return RULES.get(rule.name, rule.name).capitalize()
