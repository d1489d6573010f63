"""The gate's page: what an evaluation measured, rule by rule and family by family."""

from __future__ import annotations

from collections.abc import Iterator

import click

from nightschool.cli.output import note, write_fields, write_table
from nightschool.records import EarlyStop, Evaluation, GateRule, JudgeResult, SampledResult


def write_evaluation(found: Evaluation) -> None:
    """The decision, its rules, its families and what was sampled, for a person."""
    click.echo("")
    write_fields(
        [
            ("gate", "passed" if found.passed else "not passed"),
            ("evaluation", f"{found.id}: {found.candidate} against {found.incumbent}"),
            ("set", f"version {found.set_version}, {found.set_digest[:12]}, n {found.n}" if found.set_version else ""),
            ("detectable", f"{found.detectable * 100:.1f} points in 8 of 10 runs" if found.detectable else ""),
            ("judge", _judged(found.judge) if found.judge is not None else ""),
            ("early stop", _stopped(found.early_stop) if found.early_stop is not None else ""),
            *((f"note {number}", text) for number, text in enumerate(found.notes, start=1)),
        ]
    )
    # Evaluations of older servers have their rules as text alone.
    rules = [[_status(rule), rule.name, rule.text] for rule in found.rules] or [
        [*reason.partition(": ")[::2]] for reason in found.reasons
    ]
    write_table(["", "rule", ""] if found.rules else ["", "rule"], rules, empty="no rule was recorded")
    if found.families:
        write_table(["family", "n", "before", "after", "gained", "lost", "p", "no worse, p"], _families(found))
    if found.sampled is not None:
        _write_sampled(found.sampled)


def _stopped(stop: EarlyStop) -> str:
    where = f"after {stop.n} of {stop.num_planned} tasks, {stop.num_looks} looks"
    return f"{stop.verdict} {where}, evidence {stop.e_value:.3g}"


def _judged(judge: JudgeResult) -> str:
    who = f"{judge.name}{' (the training critic)' if judge.is_training_critic else ''}"
    return f"{who}: {judge.num_won} won, {judge.num_lost} lost, {judge.num_tied} tied, win rate {judge.win_rate:.1%}"


def _status(rule: GateRule) -> str:
    return "held" if rule.held else "FAILED" if rule.decides else "noted"


def _families(found: Evaluation) -> Iterator[list[str]]:
    for family in found.families:
        rates = [f"{family.incumbent_success:.1%}", f"{family.candidate_success:.1%}"]
        counts = [str(family.num_gained), str(family.num_lost), f"{family.p_value:.2g}"]
        proof = f"{family.non_inferiority_p:.2g}" if family.provable else "too few"
        yield [family.family, str(family.n), *rates, *counts, proof]


def _write_sampled(sampled: SampledResult) -> None:
    before, after = sampled.incumbent, sampled.candidate
    if before is None or after is None:
        return
    note(
        f"{sampled.num_draws} sampled answers each of {sampled.num_tasks} tasks at T {sampled.temperature:g}: "
        f"{sampled.reading}"
    )
    rows = [
        [f"pass@{k}", f"{old:.1%}", f"{new:.1%}"]
        for k, (old, new) in enumerate(zip(before.pass_at, after.pass_at, strict=True), start=1)
    ]
    rows.append(["different answers", f"{before.distinct_answers:.2f}", f"{after.distinct_answers:.2f}"])
    rows.append(["different first actions", f"{before.distinct_actions:.2f}", f"{after.distinct_actions:.2f}"])
    write_table(["sampled", "before", "after"], rows)
