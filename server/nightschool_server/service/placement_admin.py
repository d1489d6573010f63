"""SleepEngine and ExportRun: the engine's device lent to a trainer, and a run handed to one on another host.

Owns that the device comes back however the call ends: the caller cancels, is killed, or the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

from nightschool_proto.v1 import admin_pb2

from nightschool_server.errors import FailedPreconditionError, UnknownCycleError
from nightschool_server.runtime import Runtime

log = logging.getLogger(__name__)

TOLD_EVERY_S = 2.0
"""How often a caller hears that the engine still sleeps; one that is gone is noticed by the connection's end."""

CHUNK_BYTES = 1024 * 1024
RUN_FILE = "train/run.tar"
"""In a cycle's folder, while it waits for a trainer on another host."""


class PlacementAdmin:
    """The engine's sleep, and runs for other hosts."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._waking: asyncio.Task[None] | None = None

    async def sleep(self, actor: str, reason: str) -> AsyncGenerator[admin_pb2.SleepEngineResponse, None]:
        """Put the engine to sleep for as long as this is read. Raises FailedPreconditionError."""
        if self._waking is not None:
            await asyncio.shield(self._waking)
        counters = self._runtime.counters
        if counters.is_lent:
            raise FailedPreconditionError("the engine sleeps already, or is about to: one at a time")
        log.info("event=engine_sleep_asked by=%s reason=%r", actor, reason)
        counters.is_lent = True
        try:
            # Whole calls, so that no task loses its engine between two steps.
            await counters.idle(("live", "practice"))
            await self._runtime.engine.sleep()
        except BaseException:
            counters.is_lent = False
            raise
        began = time.monotonic()
        try:
            while True:
                yield admin_pb2.SleepEngineResponse(seconds_asleep=time.monotonic() - began)
                await asyncio.sleep(TOLD_EVERY_S)
        finally:
            # A task of its own: the call that ends may be cancelled, and nobody waits for it.
            self._waking = asyncio.create_task(self._wake(), name="wake the engine")

    async def export(self, cycle_id: str) -> AsyncGenerator[admin_pb2.ExportRunResponse, None]:
        """The run of a cycle that waits for a trainer. Raises FailedPreconditionError, UnknownCycleError."""
        cycle_id = cycle_id or self._running_cycle()
        if self._runtime.store.one("SELECT id FROM cycles WHERE id = ?", (cycle_id,)) is None:
            raise UnknownCycleError(cycle_id)
        path = run_file(self._runtime.home.cycles, cycle_id)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            raise FailedPreconditionError(
                f"cycle {cycle_id} waits for no trainer: it is not there yet, has its adapter already, or does not run "
                "with learner.train.placement = 'remote'"
            ) from None
        with file:
            while chunk := await asyncio.to_thread(_read, file):
                yield admin_pb2.ExportRunResponse(cycle_id=cycle_id, chunk=chunk)

    async def _wake(self) -> None:
        try:
            await self._runtime.engine.wake()
        finally:
            self._runtime.counters.is_lent = False
            self._waking = None

    def _running_cycle(self) -> str:
        found = self._runtime.store.one("SELECT id FROM cycles WHERE state = 'running'")
        if found is None:
            raise FailedPreconditionError("no cycle runs, so none waits for a trainer: try again later")
        return str(found["id"])


def run_file(cycles: Path, cycle_id: str) -> Path:
    """Where the run of a cycle lies for other hosts."""
    return cycles / cycle_id / RUN_FILE


def _read(file: BinaryIO) -> bytes:
    return file.read(CHUNK_BYTES)
