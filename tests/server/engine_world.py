"""A running engine, its slow reference and its adapters, over one tiny model, and ways to ask it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from nightschool_server.chat import user
from nightschool_server.engine import BASE, LIVE_PRIORITY, Delta, Engine, GenerateRequest, Prompt, Sampling
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig

from tests.server.engine_reference import Reference
from tests.server.tiny_models import picture

KIND = os.environ.get("NIGHTSCHOOL_TEST_ENGINE", "transformers")
"""Which engine the suite runs on: `make test-vllm` sets it to vllm, in an environment of its own."""

VLLM_BLOCK = 32
"""Tokens that vLLM's prefix cache takes or leaves together."""


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
    async def engine(self, **changes: Any) -> AsyncIterator[Engine]:
        """An engine with both adapters loaded."""
        engine = await start(str(self.folder), **changes)
        try:
            for name, folder in self.adapters.items():
                await engine.load_adapter(name, folder)
            yield engine
        finally:
            await engine.close()


async def start(model: str, **changes: Any) -> Engine:
    """An engine of the kind under test. Settings that vLLM has no name for are left out there."""
    if KIND == "transformers":
        return await TransformersEngine.start(TransformersEngineConfig(model=model, **{"num_threads": 1, **changes}))
    from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
    from nightschool_server.engines.vllm_engine import VLLMEngine

    known = {f.name for f in fields(VLLMEngineConfig)}
    return await VLLMEngine.start(VLLMEngineConfig(model=model, **{k: v for k, v in changes.items() if k in known}))


def num_cached(num_known_tokens: int) -> int:
    """How many tokens come from the prefix cache when that many of a prompt were computed before."""
    return num_known_tokens - 1 if KIND == "transformers" else (num_known_tokens - 1) // VLLM_BLOCK * VLLM_BLOCK


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


async def answers(engine: Engine, asked: GenerateRequest) -> list[Answer]:
    """The n answers of a request, run to their ends."""
    found = [Answer() for _ in range(asked.sampling.n)]
    async for delta in engine.generate(asked):
        found[delta.index].add(delta)
    return found


async def answer(engine: Engine, asked: GenerateRequest) -> Answer:
    """The answer of a request with n = 1."""
    return (await answers(engine, asked))[0]


def prompt_with(text: str, *images: bytes) -> Prompt:
    """A user's message with images before the text."""
    by_name = {hashlib.sha256(data).hexdigest(): data for data in images}
    return Prompt((user(text, list(by_name)),), images=by_name)


def pictures(*seeds: int) -> list[bytes]:
    """Random pictures of different sizes."""
    return [picture(seed, 24 + 8 * (seed % 4), 40 - 8 * (seed % 3)) for seed in seeds]
