"""One preference pair with all that it rests on, as frozen types; field names are those of `admin.proto`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from nightschool.content import Message
from nightschool.records import Pair

__all__ = ["PairDetail", "PairSide", "PairVerdict"]


@dataclass(frozen=True)
class PairSide:
    """One of the two candidates."""

    text: str
    observation: str
    """What its tools gave back, as the critic saw it."""
    failure: str
    """The fact that speaks against it; empty where none does."""
    num_samples: int
    logprob: float
    """Nats, of all its tokens."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PairVerdict:
    """The critic's comparison of the two in one order."""

    chosen_first: bool
    verdict: str
    """first, second or invalid."""
    margin: float
    """Nats, in favour of the chosen one."""
    raw: str
    """What the critic wrote."""


@dataclass(frozen=True)
class PairDetail:
    """A pair with its conversation, its critique and its lineage."""

    pair: Pair | None
    messages: tuple[Message, ...]
    """What the model had been told when it sampled both."""
    chosen: PairSide | None
    rejected: PairSide | None
    verdicts: tuple[PairVerdict, ...]
    task_prompt: str
    seed_request_ids: tuple[str, ...]
    """The logged requests that the task was written from."""
    sampled_by: str
    trained: str
    """The adapter that was trained on it; empty where none was."""
    created_at: datetime | None
    decided_by: str
    """facts, or the component of the critic that decided between the two: judge, scorer, ..."""
