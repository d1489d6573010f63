"""What people thought of similar actions on similar requests, as a component of the critic.

A request with feedback is similar to a task where they share enough of their words, numbers not counted. An action is
similar to one of that request's where it does the same with other values: the same tools with arguments of the same
shape, or an answer of the same shape. The score of a candidate is what people thought of such actions, from -1 (all
against) to 1 (all for), weighted by similarity; where none is similar there is none.

Owns the reading of feedback and these two similarities; pure but for one query.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nightschool_server.agent.formats import ActionFormat, action_format
from nightschool_server.store.store import Store

from nightschool_learner.panel import Case, Score
from nightschool_learner.screening import words_of
from nightschool_learner.stages import Cycle

GOOD_SCORE = 0.5
"""A score below is against, one above for."""
MAX_REQUESTS = 2000
"""The newest requests with feedback that are looked at."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Opinion:
    """What somebody thought of a request's actions."""

    words: frozenset[str]
    """Of the request, numbers left out."""
    shapes: frozenset[str]
    """Of its actions."""
    value: int
    """1 for, -1 against."""


def open_feedback(cycle: Cycle) -> Score:
    """The component's score over the home's feedback as it is now."""
    form = action_format(cycle.agent)
    opinions = opinions_of(cycle.store, form)
    min_similarity = cycle.config.critic.feedback_similarity

    @lru_cache(maxsize=64)
    def similar(task: str) -> list[tuple[float, Opinion]]:
        words = asked_words(task)
        found = [(similarity(words, opinion.words), opinion) for opinion in opinions]
        return [(share, opinion) for share, opinion in found if share >= min_similarity]

    async def score(case: Case, position: int) -> float | None:
        return standing(shape_of(case.views[position].action, form), similar(case.context.task))

    return score


def standing(shape: str, similar: Sequence[tuple[float, Opinion]]) -> float | None:
    """What people thought of actions of this shape; None where nobody said."""
    said = [(share, opinion.value) for share, opinion in similar if shape in opinion.shapes]
    total = sum(share for share, _ in said)
    return sum(share * value for share, value in said) / total if total else None


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Share of words in common (Jaccard)."""
    return len(a & b) / len(a | b) if a or b else 0.0


def asked_words(text: str) -> frozenset[str]:
    """The words of a request, numbers left out: requests differ in their values."""
    return frozenset(word for word in words_of(text) if not word.isdigit())


def shape_of(action: str, form: ActionFormat) -> str:
    """What an action does, whatever the values: every number of it is one and the same."""
    return _NUMBER.sub("#", form.key(action))


def opinions_of(store: Store, form: ActionFormat) -> list[Opinion]:
    """Everything that people said about trainable requests, newest first. A correction is for what it says instead."""
    rows = store.query(
        "SELECT f.response_id, f.good, f.score, f.correction FROM feedback f JOIN requests r ON r.id = f.response_id "
        "WHERE r.policy = 'train' ORDER BY f.created_at DESC LIMIT ?",
        (MAX_REQUESTS,),
    )
    found: list[Opinion] = []
    for row in rows:
        prompt, shapes = _request(store, row["response_id"], form)
        words = asked_words(prompt)
        value = _value(row["good"], row["score"])
        if value and shapes:
            found.append(Opinion(words, shapes, value))
        if row["correction"]:
            found.append(Opinion(words, frozenset({shape_of(row["correction"], form)}), 1))
    return found


def _value(good: int | None, score: float | None) -> int:
    if good is not None:
        return 1 if good else -1
    if score is None or score == GOOD_SCORE:
        return 0
    return 1 if score > GOOD_SCORE else -1


def _request(store: Store, response_id: str, form: ActionFormat) -> tuple[str, frozenset[str]]:
    """The words that were asked, and the shape of each action that the model took."""
    rows = store.query(
        "SELECT role, parts, sampled FROM messages WHERE response_id = ? ORDER BY position", (response_id,)
    )
    prompt = " ".join(_text(row["parts"]) for row in rows if row["role"] == "user")
    shapes = {shape_of(_text(row["parts"]), form) for row in rows if row["sampled"]}
    return prompt, frozenset(shapes - {""})


def _text(parts: str) -> str:
    return "".join(part.get("text", "") for part in json.loads(parts) if part.get("type") == "text")
