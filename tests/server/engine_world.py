"""A running engine, its slow reference and its adapters, over one tiny model, and ways to ask it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nightschool_server.chat import user
from nightschool_server.engine import BASE, LIVE_PRIORITY, Delta, GenerateRequest, Prompt, Sampling
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig

from tests.server.engine_reference import Reference
from tests.server.tiny_models import picture


@dataclass
class World:
    """A model folder, two adapters on disk, and the reference with both loaded."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.reference = Reference(self.folder, self.adapters)

    @asynccontextmanager
    async def engine(self, **changes: Any) -> AsyncIterator[TransformersEngine]:
        """An engine with both adapters loaded."""
        config = TransformersEngineConfig(model=str(self.folder), **{"num_threads": 1, **changes})
        engine = await TransformersEngine.start(config)
        try:
            for name, folder in self.adapters.items():
                await engine.load_adapter(name, folder)
            yield engine
        finally:
            await engine.close()


@dataclass
class Answer:
    """All deltas of one answer, joined."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[Any, ...]] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        assert self.finish_reason is None, "nothing follows the last delta"
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.top_logprobs += delta.top_logprobs
        self.finish_reason = delta.finish_reason
        self.num_prompt_tokens, self.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens


def request(
    prompt: Prompt | str, adapter: str = BASE, priority: int = LIVE_PRIORITY, **sampling: Any
) -> GenerateRequest:
    """A request, greedy with 24 tokens unless told otherwise."""
    if isinstance(prompt, str):
        prompt = Prompt((user(prompt),))
    return GenerateRequest(
        "test", prompt, Sampling(**{"max_tokens": 24, "temperature": 0.0, **sampling}), adapter, priority
    )


async def answers(engine: TransformersEngine, asked: GenerateRequest) -> list[Answer]:
    """The n answers of a request, run to their ends."""
    found = [Answer() for _ in range(asked.sampling.n)]
    async for delta in engine.generate(asked):
        found[delta.index].add(delta)
    return found


async def answer(engine: TransformersEngine, asked: GenerateRequest) -> Answer:
    """The answer of a request with n = 1."""
    return (await answers(engine, asked))[0]


def prompt_with(text: str, *images: bytes) -> Prompt:
    """A user's message with images before the text."""
    by_name = {hashlib.sha256(data).hexdigest(): data for data in images}
    return Prompt((user(text, list(by_name)),), images=by_name)


def pictures(*seeds: int) -> list[bytes]:
    """Random pictures of different sizes."""
    return [picture(seed, 24 + 8 * (seed % 4), 40 - 8 * (seed % 3)) for seed in seeds]
