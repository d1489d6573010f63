"""What is being generated or scored: a job per request, a sequence per answer.

Owns the bookkeeping of token ids: how many are known (prompt and sampled), how many are in the cache,
and from which position logits are still needed. Touched by the owner thread alone.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from nightschool_server.engine import Sampling
from nightschool_server.engines.delivery import Mailbox
from nightschool_server.engines.matching import Compiled, Matcher
from nightschool_server.engines.rendering import Rendered
from nightschool_server.engines.text_stream import TextStream


@dataclass(eq=False)
class Job:
    """One request: its prompt, its adapter version, who waits for it."""

    request_id: str
    rendered: Rendered
    sampling: Sampling
    serial: int
    """Of the adapter version; 0 is the base."""
    priority: int
    mailbox: Mailbox
    arrival: int
    """Order in which requests came, before they were rendered."""
    continuation: NDArray[np.int64] | None = None
    """[num_tokens] to score; None generates."""
    guide: Compiled | None = None
    """What the answers are held to."""
    seed: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    placeholders: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Indices of the prompt's image placeholders, in order: one per row of `features`."""
    features: torch.Tensor | None = None
    """[num_placeholders, hidden] once the vision tower has run."""

    def __post_init__(self) -> None:
        self.seed = self.sampling.seed if self.sampling.seed is not None else secrets.randbits(62)
        self.placeholders = np.flatnonzero(self.rendered.keys < 0)
        count = 1 if self.continuation is not None else self.sampling.n
        self.sequences = [Sequence(self, i) for i in range(count)]

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.rendered.token_ids)

    @property
    def needs_vision(self) -> bool:
        """Whether the vision tower has yet to run for this job."""
        return len(self.placeholders) > 0 and self.features is None


class Sequence:
    """One answer of a job."""

    __slots__ = (
        "finished", "ids", "index", "job", "keys", "matcher", "num_cached", "num_computed", "num_known",
        "scores", "slot", "started", "text",
    )  # fmt: skip

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        num_prompt = job.num_prompt
        room = len(job.continuation) if job.continuation is not None else job.sampling.max_tokens
        self.ids: NDArray[np.int64] = np.zeros(num_prompt + room, dtype=np.int64)
        self.ids[:num_prompt] = job.rendered.token_ids
        self.keys = self.ids.copy()
        self.keys[:num_prompt] = job.rendered.keys
        self.num_known = num_prompt
        self.num_computed = 0
        self.num_cached = 0
        """Prompt tokens that another sequence had computed."""
        self.slot = -1
        self.started = False
        """Whether it ever held a slot."""
        self.finished = False
        self.text: TextStream | None = None
        self.matcher: Matcher | None = None
        self.scores: list[float] = []
        if job.continuation is not None:
            self.ids[num_prompt:] = job.continuation
            self.keys[num_prompt:] = job.continuation
            self.num_known = len(self.ids)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        return self.num_known - self.job.num_prompt

    @property
    def needs_logits_from(self) -> int:
        """The first position whose logits nobody has read: the cache may be taken over up to there."""
        if self.job.continuation is not None:
            return self.job.num_prompt - 1 + len(self.scores)
        return self.num_known - 1

    @property
    def num_to_compute(self) -> int:
        """Known tokens that have to be in the cache; a scored continuation's last token need not."""
        return self.num_known - 1 if self.job.continuation is not None else self.num_known

    def push(self, token_id: int) -> None:
        """Append a sampled token."""
        self.ids[self.num_known] = token_id
        self.keys[self.num_known] = token_id
        self.num_known += 1

    def positions(self, start: int, end: int) -> NDArray[np.int64]:
        """Rotary positions of tokens [start, end): [end - start], or [3, end - start] with images that have three."""
        rendered = self.job.rendered
        if rendered.positions is None:
            return np.arange(start, end, dtype=np.int64)
        num_prompt = self.job.num_prompt
        later = np.arange(max(start, num_prompt), max(end, num_prompt), dtype=np.int64) + rendered.position_delta
        return np.concatenate([rendered.positions[:, start : min(end, num_prompt)], np.tile(later, (3, 1))], axis=1)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence that one step computes."""

    sequence: Sequence
    start: int
    end: int

    @property
    def first_logit(self) -> int:
        """First position in the chunk whose logits are read; `end` where none is."""
        sequence = self.sequence
        if sequence.job.continuation is None and self.end < sequence.num_known:
            return self.end
        return min(self.end, max(self.start, sequence.needs_logits_from))
