"""An engine without a model, for tests of the registry: it scores by a number that lies in the adapter's weights.

Holds the registry to the engine's contract: a name is loaded once, unloaded only where nobody uses it, and scored only
while it is loaded; the merged one is not unloaded. `gate` lets a test hold a load open, `merge_gate` a merge;
`on_score` lets it act in the middle of a proof.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nightschool_server.adapters.folder import PROVENANCE_FILE
from nightschool_server.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from nightschool_server.chat import messages_to_json, user
from nightschool_server.engine import BASE, Delta, EngineStats, GenerateRequest, ModelInfo, Prompt, Scores
from nightschool_server.errors import AdapterFormatError, FailedPreconditionError, UnknownAdapterError
from safetensors.numpy import load_file, save_file

MAX_RANK = 64


class FakeEngine:
    """Implements `engine.Engine` as far as the registry uses it."""

    def __init__(self, base_digest: str = "b" * 64) -> None:
        self.model = ModelInfo("tiny", base_digest, "c" * 64, 512, False, MAX_RANK)
        self.effects: dict[str, float] = {}
        self.loads: list[str] = []
        self.merges: list[str] = []
        self.merged = BASE
        self.is_asleep = False
        self.unmergeable: set[str] = set()
        self.merge_gate = asyncio.Event()
        self.merge_gate.set()
        self.merging = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.loading = asyncio.Event()
        self.on_score: Callable[[str], None] = lambda adapter: None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        raise NotImplementedError
        yield

    async def score(self, prompt: Prompt, continuation: str, *, adapter: str = BASE, priority: int = 0) -> Scores:
        self.on_score(adapter)
        if adapter != BASE and adapter not in self.effects:
            raise UnknownAdapterError(adapter)
        await asyncio.sleep(0)
        logprobs = tuple(-1.0 - self.effects.get(adapter, 0.0) for _ in continuation.split())
        return Scores(tuple(range(len(logprobs))), logprobs, 1)

    async def load_adapter(self, name: str, folder: Path) -> None:
        assert name not in self.effects, f"{name} is loaded already"
        self.loading.set()
        await self.gate.wait()
        tensors = load_file(folder / WEIGHTS_FILE)
        if tensors[A_KEY].shape[0] > MAX_RANK:
            raise AdapterFormatError(f"rank {tensors[A_KEY].shape[0]} is above {MAX_RANK}")
        self.effects[name] = float(tensors[B_KEY][0, 0])
        self.loads.append(name)

    async def unload_adapter(self, name: str) -> None:
        if name == self.merged:
            raise FailedPreconditionError(f"{name} is merged")
        del self.effects[name]

    async def merge_adapter(self, name: str) -> None:
        self.merging.set()
        await self.merge_gate.wait()
        self.merges.append(name)
        if name not in (BASE, *self.effects):
            raise UnknownAdapterError(name)
        if name in self.unmergeable:
            raise FailedPreconditionError(f"{name} cannot be merged")
        self.merged = name

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, tuple(self.effects), self.merged)

    async def sleep(self) -> None:
        self.is_asleep = True

    async def wake(self) -> None:
        self.is_asleep = False

    def healthy(self) -> bool:
        return not self.is_asleep

    async def close(self) -> None:
        self.effects.clear()


A_KEY = "base_model.model.layer.lora_A.weight"
B_KEY = "base_model.model.layer.lora_B.weight"


def make_adapter(folder: Path, effect: float = 0.5, rank: int = 4, provenance: Mapping[str, Any] | None = None) -> Path:
    """A PEFT folder whose adapter lowers every logprob by `effect`."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    down, up = np.ones((rank, 8), np.float32), np.full((8, rank), effect, np.float32)
    save_file({A_KEY: down, B_KEY: up}, folder / WEIGHTS_FILE)
    if provenance is not None:
        (folder / PROVENANCE_FILE).write_text(json.dumps(provenance))
    return folder


def recorded_probe(effect: float, num_tokens: int = 3) -> dict[str, Any]:
    """What a trainer records of an adapter with that effect."""
    words = " ".join(["word"] * num_tokens)
    prompt = {"messages": messages_to_json([user("a question")]), "tools": [], "continuation": words}
    return {"prompts": [prompt], "logprobs": [[-1.0 - effect] * num_tokens]}
