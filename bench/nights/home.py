"""A home of the shop with live requests to learn from, and the cycles that run on it.

Server and learner are real processes; this one asks as a customer and as an operator.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

from nightschool import AsyncClient, Cycle

from bench.nights.measuring import MEASURING
from examples.shop.night.server import ROOT, serving
from examples.shop.night.traffic import FEEDBACK_SHARE
from examples.shop.traffic import Request, traffic

AT_ONCE = 8
"""Customers who ask at one time."""
POLL_S = 0.5
CYCLE_LIMIT_S = 3600.0
SETTINGS = ("engine.kind=transformers", "learner.fault_injection.allow=true")
"""Of every server. The learner's libraries go with the transformers engine."""


@asynccontextmanager
async def open_shop(home: Path) -> AsyncIterator[AsyncClient]:
    """A server of the shop with its learner on the folder `home`, and a client of it."""
    await asyncio.to_thread(_settle, home)
    async with serving(home, SETTINGS), AsyncClient(home=home) as client:
        yield client


def _settle(home: Path) -> None:
    if not home.exists():
        home.mkdir(parents=True)
        shutil.copy(ROOT / "examples" / "shop" / "config.toml", home / "config.toml")


def requests_of(seed: int, num: int) -> list[Request]:
    """What customers ask before a cycle."""
    return list(islice(traffic(seed), num))


async def ask(client: AsyncClient, seed: int, num: int) -> None:
    """Have the shop asked, and half of its answers rated by customers who know better."""
    room, rng = asyncio.Semaphore(AT_ONCE), random.Random(f"customers {seed}")

    async def one(request: Request, rates: bool) -> None:
        async with room:
            told = client.run_task(request.prompt, images=request.images, temperature=0.0, learning="train")
            result = await told.result()
            if rates:
                await client.feedback(result.response_id, good=request.liked(result.answer))

    await asyncio.gather(*(one(request, rng.random() < FEEDBACK_SHARE) for request in requests_of(seed, num)))


async def practise(client: AsyncClient, *, reason: str, seed: int, overrides: Sequence[str]) -> Cycle:
    """Run one cycle with a seed of its own. Returns it as it ended."""
    cycle = await client.admin.cycles.trigger(reason=reason, overrides=(*overrides, f"seed={seed}"))
    async with asyncio.timeout(CYCLE_LIMIT_S):
        while not cycle.state.ended:
            await asyncio.sleep(POLL_S)
            cycle = await client.admin.cycles.get(cycle.id)
    if cycle.state in ("failed", "cancelled"):
        raise RuntimeError(f"cycle {cycle.id} ({reason}) ended as {cycle.state}: {cycle.outcome}")
    return cycle


async def measure_active(client: AsyncClient, overrides: Sequence[str]) -> None:
    """Have the active adapter answer the held-out tasks that it has not answered yet."""
    await practise(client, reason="measure", seed=1, overrides=(*overrides, *MEASURING))
