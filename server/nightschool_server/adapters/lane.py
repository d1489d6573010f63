"""The merged lane follows the active adapter: the engine serves it merged into the weights, at the base model's speed.

Owns the task that moves the lane, in the background: answers are the same before, during and after a move, so nobody
waits for one, and where it fails serving goes on unmerged. The engine says what is merged now (`EngineStats.merged`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from nightschool_server.engine import BASE, Engine

log = logging.getLogger(__name__)


class AdapterLane:
    """The merged lane of one engine; where it is not `enabled` nothing is ever merged."""

    def __init__(self, engine: Engine, *, enabled: bool) -> None:
        self._engine = engine
        self._enabled = enabled
        self._wanted = BASE
        self._moving: asyncio.Task[None] | None = None

    def follow(self, name: str) -> None:
        """Have `name` merged, in the background. Of several calls during a move the last one counts."""
        self._wanted = name
        if self._enabled and (self._moving is None or self._moving.done()):
            self._moving = asyncio.create_task(self._move(), name="adapter_lane")

    async def settle(self) -> None:
        """Wait until the lane stands still."""
        if self._moving is not None:
            await asyncio.wait({self._moving})

    async def leave(self, name: str) -> None:
        """Before `name` is unloaded: wait until it is not merged; the base takes its place where the lane got stuck."""
        await self.settle()
        if self._engine.stats().merged == name:
            await self._engine.merge_adapter(BASE)

    async def close(self) -> None:
        """End a move that is under way."""
        if self._moving is not None:
            self._moving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._moving

    async def _move(self) -> None:
        wanted = None
        while wanted != self._wanted:
            wanted = self._wanted
            try:
                await self._engine.merge_adapter(wanted)
            except Exception as error:  # the boundary of a move: the lane is a matter of speed alone
                log.warning("event=lane_failed adapter=%s error=%r", wanted, error)
