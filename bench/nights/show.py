"""What people read of the table: a night in one line while they wait, and the tables of a page out of its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nightschool_learner.statistics import mcnemar_p

from bench.nights.measures import ALPHA, Night

BASELINE = "as_shipped"
"""The row that the other ablations and recipes are paired with, task by task; the first of `cycles` is the same."""


def line_of(night: Night) -> str:
    """How it ended and what it came to."""
    parts = [night.state]
    if night.candidate_success is not None and night.candidate_change is not None:
        found, change = night.candidate_success, night.candidate_change
        parts.append(
            f"candidate {found.rate:.1%} of {found.n} ({change.difference * 100:+.1f} points, p {change.p:.2g})"
        )
    elif night.active_success is not None:
        parts.append(f"{night.active} {night.active_success.rate:.1%} of {night.active_success.n}")
    right = f", {night.pair_accuracy:.0%} of them right" if night.pair_accuracy is not None else ""
    parts.append(f"{night.pairs} pairs{right}")
    parts.append(f"{night.seconds.get('cycle', 0):.0f} s")
    if night.candidate_success is None:
        parts.append(night.outcome)
    return "; ".join(parts)


def tables(rows: Mapping[str, Any]) -> Iterator[str]:
    """The table's parts in Markdown, line by line."""
    if rows["cycles"]:
        yield from _markdown(_NIGHT_HEADS, [_night(number, night) for number, night in enumerate(rows["cycles"], 1)])
        yield from _families(rows["cycles"])
    # A first night as shipped begins on the same home with the same seed as every other row.
    baseline = next(iter(rows["cycles"] or rows["ablations"].get(BASELINE, {}).get("nights", ())), None)
    for group in ("ablations", "recipes"):
        if rows[group]:
            lines = [line for name, row in rows[group].items() for line in _row(name, row, baseline)]
            yield from _markdown(_ROW_HEADS, lines)


_NIGHT_HEADS = (
    "night", "ended", "trained", "active (95%)", "against the base", "p", "pass@1", "pass@5 (change, 95%)",
    "distinct first actions", "families that fell", "pairs (right)", "critic on the gold set", "seconds",
)  # fmt: skip


def _night(number: int, night: Mapping[str, Any]) -> list[str]:
    change = night["against_base"]
    spread = change["spread"] if change else None
    gold = night["critic"].get("gold", {})
    return [
        str(number),
        night["state"],
        f"{night['candidate_success']['rate']:.1%}" if night["candidate_success"] else "",
        _success(night["active_success"]),
        f"{_points(change['difference'])} ({_points(change['low'])} to {_points(change['high'])})" if change else "",
        f"{change['p']:.2g}" if change else "",
        f"{spread['pass_at_1'][0]:.1%} -> {spread['pass_at_1'][1]:.1%}" if spread else "",
        _pass_at_n(spread) if spread else "",
        f"{spread['distinct_actions'][0]:.2f} -> {spread['distinct_actions'][1]:.2f}" if spread else "",
        ", ".join(change["fallen"]) or "none" if change else "",
        _pairs(night),
        f"{gold['num_agreed']} of {gold['num_decided']}" if gold.get("num_decided") else "",
        f"{night['seconds'].get('cycle', 0):.0f}",
    ]


def _families(nights: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each family's success with the base and after each night; the least adjusted p of a fall beside it."""
    changes = [night["against_base"] for night in nights if night["against_base"]]
    if not changes:
        return
    lines = []
    for name, first in changes[0]["families"].items():
        found = [change["families"][name] for change in changes]
        falls = [family["adjusted_p"] for family in found if family["after"] < family["before"]]
        rates = [f"{family['after']:.0%}" for family in found]
        lines.append([name, str(first["n"]), f"{first['before']:.0%}", *rates, f"{min(falls, default=1.0):.2g}"])
    numbers = [str(number) for number, night in enumerate(nights, 1) if night["against_base"]]
    yield from _markdown(("family", "n", "base", *numbers, "least adjusted p of a fall"), lines)


_ROW_HEADS = (
    "row", "what is different", "ended", "success (95%)", f"tasks won, lost against `{BASELINE}` (p)",
    "families that fell", "pairs (right)", "tokens sampled", "tokens read by the critic", "seconds",
)  # fmt: skip


def _row(name: str, row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Iterator[list[str]]:
    for number, night in enumerate(row["nights"], 1):
        several = f" {number}" if len(row["nights"]) > 1 else ""
        change = night["candidate_change"]
        yield [
            f"`{name}`{several}",
            row["what"] if number == 1 else "",
            night["state"],
            _success(night["candidate_success"]),
            _paired(night, baseline) if baseline and name != BASELINE else "",
            ", ".join(change["fallen"]) or "none" if change else "",
            _pairs(night),
            f"{night['tokens'].get('practice', 0):,}",
            f"{night['tokens'].get('critic_prompts', 0):,}",
            f"{night['seconds'].get('cycle', 0):.0f}",
        ]


def _paired(night: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if not night["candidate_success"] or not other["candidate_success"]:
        return ""
    missed, missed_before = set(night["candidate_missed"]), set(other["candidate_missed"])
    won, lost = len(missed_before - missed), len(missed - missed_before)
    p = mcnemar_p(won, lost)
    mark = " *" if p < ALPHA else ""
    return f"{won}, {lost} ({p:.2g}{mark})"


def _success(found: Mapping[str, Any] | None) -> str:
    return f"{found['rate']:.1%} ({found['low']:.1%} to {found['high']:.1%})" if found else "nobody was trained"


def _pass_at_n(spread: Mapping[str, Any]) -> str:
    before, after = spread["pass_at_n"]
    low, high = spread["pass_at_n_change"]
    return f"{before:.1%} -> {after:.1%} ({_points(low)} to {_points(high)})"


def _pairs(night: Mapping[str, Any]) -> str:
    """All pairs, and of those that set a right action against a wrong one, how many chose the right one."""
    right, wrong = (night["pair_verdicts"].get(verdict, 0) for verdict in ("right", "wrong"))
    return f"{night['pairs']} ({right} of {right + wrong})"


def _points(share: float) -> str:
    return f"{share * 100:+.1f}"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"
