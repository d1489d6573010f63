"""Live clients at a steady rate, in an open loop, and the server and home of the shop that they ask.

A request is sent when its time has come, whether or not earlier ones were answered: a server that falls behind gets
no fewer, and what they wait is seen. Times between two requests are drawn evenly from half to one and a half of the
interval, so that they keep no step with anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nightschool import AsyncClient

from bench.load import Trace, trace_of
from examples.shop.night.server import ROOT, serving
from examples.shop.traffic import traffic

TOKENS = 24
SEEDS_AT_ONCE = 8


@dataclass(frozen=True)
class Live:
    """One live request."""

    sent_at: float
    """Unix time, as the stages of a cycle are stamped."""
    trace: Trace

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.trace.arrivals[0] - self.trace.began)


class Clients:
    """The clients between `begin` and `end`."""

    def __init__(self, client: AsyncClient, interval_s: float, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self._interval_s = interval_s
        self._prompts = _prompts(seed)
        self._answered: list[Live] = []
        self._sent: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None]

    def begin(self) -> None:
        """Send from now on."""
        self._sender = asyncio.create_task(self._send())

    async def end(self) -> list[Live]:
        """Send no more; all requests, when they are answered. Raises what one of them raised."""
        self._sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sender
        await asyncio.gather(*self._sent)
        return self._answered

    async def _send(self) -> None:
        due = time.perf_counter()
        while True:
            due += self._interval_s * self._rng.uniform(0.5, 1.5)
            await asyncio.sleep(due - time.perf_counter())
            self._sent.add(asyncio.create_task(self._ask(next(self._prompts))))

    async def _ask(self, prompt: str) -> None:
        sent_at = time.time()
        self._answered.append(Live(sent_at, await trace_of(self._pieces(prompt))))

    async def _pieces(self, prompt: str) -> AsyncIterator[tuple[str, int | None, int | None]]:
        stream = self._client.stream(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, learning="no_log")
        async for piece in stream:
            yield piece, None, None
        yield "", stream.reply.usage.completion_tokens, stream.reply.usage.prompt_tokens


async def make_home(home: Path, num_seeds: int) -> None:
    """A home of the shop with `num_seeds` logged tasks to learn from; nobody serves it afterwards."""
    _copy_settings(home)
    async with shop(home, ["learner.enabled=false"]) as client:
        requests, room = traffic(1), asyncio.Semaphore(SEEDS_AT_ONCE)

        async def ask() -> None:
            async with room:
                request = next(requests)
                await client.run_task(request.prompt, images=request.images, temperature=0.0, learning="train").result()

        await asyncio.gather(*(ask() for _ in range(num_seeds)))


@asynccontextmanager
async def shop(home: Path, settings: list[str]) -> AsyncIterator[AsyncClient]:
    """A server of the shop on the transformers engine, which the learner's libraries go with, and its client."""
    async with serving(home, [*settings, "engine.kind=transformers"]), AsyncClient(home=home) as client:
        yield client


def _copy_settings(home: Path) -> None:
    home.mkdir()
    shutil.copy(ROOT / "examples" / "shop" / "config.toml", home / "config.toml")


def _prompts(seed: int) -> Iterator[str]:
    return (request.prompt for request in traffic(1000 + seed) if not request.images)
