"""An engine that says what a test tells it to: the fake at the engine seam, for tests of what surrounds the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from nightschool_server.engine import Delta, EngineStats, GenerateRequest, ModelInfo, Prompt, Scores

Script = Callable[[GenerateRequest], str]
"""The answer to a request."""


@dataclass
class ScriptedEngine:
    """Streams the script's answer in pieces of a few characters, one token each."""

    script: Script = lambda request: "fine."
    requests: list[GenerateRequest] = field(default_factory=list)
    gate: asyncio.Event | None = None
    """Where set, every answer stops after its first piece until the gate opens."""
    num_running: int = 0
    merged: str = "base"
    is_asleep: bool = False
    aborted: list[str] = field(default_factory=list)
    """Ids of requests that were closed before their end."""
    running: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def kind(self) -> str:
        """The engine's name in the configuration."""
        return "transformers"

    @property
    def model(self) -> ModelInfo:
        return ModelInfo("scripted", "0" * 64, "1" * 64, 4096, True, 64)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        text = self.script(request)
        pieces = [text[i : i + 4] for i in range(0, len(text), 4)] or [""]
        self.num_running += 1
        ended = False
        try:
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                self.running.set()
                yield Delta(0, piece, (number,), (-0.5,), (), "stop" if last else None, num_prompt_tokens=7)
                if self.gate is not None:
                    await self.gate.wait()
            ended = True
        finally:
            self.num_running -= 1
            if not ended:
                self.aborted.append(request.request_id)

    async def score(self, prompt: Prompt, continuation: str, *, adapter: str = "base", priority: int = 0) -> Scores:
        return Scores((1,), (-1.0 if adapter == "base" else -2.0,), 1)

    async def load_adapter(self, name: str, folder: Path) -> None:
        pass

    async def unload_adapter(self, name: str) -> None:
        pass

    async def merge_adapter(self, name: str) -> None:
        self.merged = name

    def stats(self) -> EngineStats:
        return EngineStats(self.num_running, 0, 0, 0, 0, (), self.merged)

    async def sleep(self) -> None:
        self.is_asleep = True

    async def wake(self) -> None:
        self.is_asleep = False

    def healthy(self) -> bool:
        return not self.is_asleep

    async def close(self) -> None:
        pass
