"""Joins what a producer made while its consumer was busy: one list for each wake-up instead of one item."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

Item = TypeVar("Item")


async def coalesced(items: AsyncIterator[Item]) -> AsyncGenerator[list[Item], None]:
    """Lists of one item or more, in order, each with everything that has arrived since the one before.

    A slow reader of a token stream gets fewer and larger chunks; the engine never waits for it. Closing this
    closes `items`; its exception is raised after what came before it.
    """
    arrived: list[Item] = []
    wake = asyncio.Event()

    async def pump() -> None:
        try:
            async for item in items:
                arrived.append(item)
                wake.set()
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()
            wake.set()

    task = asyncio.create_task(pump())
    try:
        while True:
            await wake.wait()
            wake.clear()
            if arrived:
                batch = arrived.copy()
                arrived.clear()
                yield batch
            if task.done() and not arrived:
                await task
                return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
