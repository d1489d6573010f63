"""GTA's rules: is an answer right, and were the tools the right ones.

Sources: the benchmark's public evaluator (arXiv 2407.08713) for `official`; SPORT (arXiv 2504.21561), which matches
substrings, for `sport`. ToolAcc and CodeExec have no public code; `matched_tools` and `metrics` are this project's
definition of them, see docs/benchmarks.md. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from nightschool_learner.benchmarks.task import Attempt, Metric, Row

Kind = Literal["phrases", "text", "image"]


@dataclass(frozen=True)
class Phrases:
    """An objective answer: groups of aliases that must be in it, groups that must not."""

    whitelist: tuple[tuple[str, ...], ...]
    blacklist: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Texts:
    """A subjective answer: texts that it should be like."""

    references: tuple[str, ...]


Reference = Phrases | Texts | None
"""None: the answer is a picture, which no rule scores."""


def kind_of(reference: Reference) -> Kind:
    """What kind of answer a task wants."""
    match reference:
        case Phrases():
            return "phrases"
        case Texts():
            return "text"
        case None:
            return "image"


def official(answer: str, phrases: Phrases) -> bool:
    """Every group of the whitelist has an alias in the answer as a whole word, no alias of the blacklist is.

    Without case. Whole word is between two of the regular expression's word boundaries, as in the public evaluator:
    an alias that ends in a sign, such as `50%`, is found only in front of a letter, a digit or an underscore.
    """
    if not all(_has_word(answer, aliases) for aliases in phrases.whitelist):
        return False
    banned = tuple(chain.from_iterable(phrases.blacklist))
    return not (banned and _has_word(answer, banned))


def sport(answer: str, phrases: Phrases) -> bool:
    """As `official`, but an alias may stand anywhere, within a longer word too."""
    text = answer.lower()
    if not all(any(alias.lower() in text for alias in aliases) for aliases in phrases.whitelist):
        return False
    return not any(alias.lower() in text for alias in chain.from_iterable(phrases.blacklist))


def matched_tools(called: Sequence[str], reference: Sequence[str]) -> int:
    """How many of the reference's tool steps the agent took, in their order: the longest common subsequence."""
    best = [0] * (len(reference) + 1)
    for name in called:
        before = best
        best = [0]
        for index, wanted in enumerate(reference, start=1):
            best.append(before[index - 1] + 1 if name == wanted else max(before[index], best[-1]))
    return best[-1]


def scored(attempt: Attempt, reference: Reference, tools: Sequence[str], similarity: float | None) -> Row:
    """The attempt's row. `tools` are the reference's steps; `similarity` is None where no embedder was given."""
    scores: dict[str, float | None] = {"official": None, "sport": None}
    if isinstance(reference, Phrases):
        answer = attempt.final_answer
        scores = {"official": float(official(answer, reference)), "sport": float(sport(answer, reference))}
    elif isinstance(reference, Texts):
        scores["official"] = similarity if attempt.final_answer else 0.0
    scores["matched_tools"] = float(matched_tools(attempt.tools, tools))
    return Row(attempt, scores, {"kind": kind_of(reference), "reference_tools": list(tools)})


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """AnsAcc by both rules, ToolAcc with its precision, CodeExec."""
    objective = [row for row in rows if row.about["kind"] == "phrases"]
    answerable = [row for row in rows if row.about["kind"] != "image"]
    actions = [action for row in rows for action in row.attempt.actions]
    matched = sum(row.scores["matched_tools"] or 0.0 for row in rows)
    num_reference = sum(len(row.about["reference_tools"]) for row in rows)
    return [
        Metric(
            "answer_official",
            sum(row.scores["official"] or 0.0 for row in answerable),
            len(answerable),
            "tasks with an answer in words",
            sum(row.scores["official"] is None for row in answerable),
        ),
        Metric("answer_sport", sum(row.scores["sport"] or 0.0 for row in objective), len(objective), "whitelist tasks"),
        Metric("tool_acc", matched, num_reference, "tool steps of the reference"),
        Metric("tool_precision", matched, sum(len(row.attempt.tools) for row in rows), "tool calls of the agent"),
        Metric("code_exec", float(sum(not a.is_error for a in actions)), len(actions), "actions of the agent"),
    ]


def _has_word(answer: str, aliases: Sequence[str]) -> bool:
    return re.search(rf"\b(?:{'|'.join(map(re.escape, aliases))})\b", answer, re.IGNORECASE) is not None
