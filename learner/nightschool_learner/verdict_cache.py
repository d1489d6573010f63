"""Answers that a critic has given before, by the hash of what it was asked, and what a cycle may still ask.

Owns the SQL of `verdicts`. A key is a hash over model, rubric and the whole prompt: context, candidates and their order
are in it. A row holds scores and counts, no text of anybody, and belongs to the cycle that paid for it; it is found by
every later one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nightschool_server.chat import Message, canonical_json, messages_to_json
from nightschool_server.config.roles import CriticConfig
from nightschool_server.store.store import Store
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner.verdicts import Scores


@dataclass(frozen=True)
class Answer:
    """One answer of a critic, read."""

    scores: Scores | None
    """In the order shown; None where it could not be read."""
    raw: str
    """Empty where it came from the cache."""
    prompt_tokens: int
    completion_tokens: int
    is_cached: bool = False


@dataclass
class Spent:
    """What a cycle's critic has taken of its budget."""

    num_asked: int = 0
    num_tokens: int = 0
    cost: float = 0.0

    def reaches(self, config: CriticConfig) -> bool:
        """Whether one of the bounds is reached; 0 is no bound."""
        bounds = (
            (config.max_comparisons, self.num_asked),
            (config.max_tokens, self.num_tokens),
            (config.max_cost, self.cost),
        )
        return any(bound and spent >= bound for bound, spent in bounds)


def key_of(model: str, rubric: str, messages: Sequence[Message], vote: int) -> str:
    """The content hash of a question."""
    return hashlib.sha256(canonical_json([model, rubric, messages_to_json(messages), vote]).encode()).hexdigest()


@dataclass(frozen=True)
class VerdictCache:
    """The answers in a store, on behalf of one cycle; None where an audit by hand asks."""

    store: Store
    cycle_id: str | None

    def spent(self) -> Spent:
        """What the cycle has paid for so far."""
        row = self.store.query(
            "SELECT COUNT(*) AS n, COALESCE(SUM(prompt_tokens + completion_tokens), 0) AS tokens, "
            "COALESCE(SUM(cost), 0) AS cost FROM verdicts WHERE cycle_id = ?",
            (self.cycle_id,),
        )[0]
        return Spent(int(row["n"]), int(row["tokens"]), float(row["cost"]))

    def get(self, key: str) -> Answer | None:
        """The answer to the question with this key, if it was given before."""
        row = self.store.one("SELECT scores FROM verdicts WHERE key = ?", (key,))
        return None if row is None else Answer(tuple(json.loads(row["scores"])) or None, "", 0, 0, is_cached=True)

    async def put(self, key: str, rubric: str, model: str, answer: Answer, cost: float) -> None:
        """Keep an answer, which was paid for, also where the call is cancelled; one that is there already stays."""
        values = (
            key, self.cycle_id, rubric, model, canonical_json(list(answer.scores or ())), answer.prompt_tokens,
            answer.completion_tokens, cost, time.time(),
        )  # fmt: skip

        def write() -> None:
            with self.store.transaction() as db:
                db.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

        await uninterrupted(asyncio.to_thread(write))
