"""Training that is not beside serving: on the engine's device while the engine sleeps, or on another host.

Owns the learner's side of both placements. Who trains on another host is `remote.py`; the server's side is
`service/placement_admin.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import nightschool
from nightschool_server.service.placement_admin import run_file

from nightschool_learner.bundle import pack
from nightschool_learner.errors import ServerGoneError, StageFailedError
from nightschool_learner.manifest import Alarm, RunFolder
from nightschool_learner.sampling import AWAY
from nightschool_learner.stages import Cycle, Progress

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often the registry is looked at for the adapter from another host."""


@dataclass(frozen=True)
class Device:
    """The device that the trainer was lent."""

    asleep: asyncio.Task[None] | None
    """Runs for as long as the engine sleeps; None where it need not."""

    def check(self) -> None:
        """Raise ServerGoneError where the engine sleeps no longer, so that the device is not the trainer's any more."""
        if self.asleep is not None and self.asleep.done():
            raise ServerGoneError("the server went away while its engine slept for the trainer")


@asynccontextmanager
async def lent_device(cycle: Cycle, progress: Progress) -> AsyncIterator[Device]:
    """The trainer's device for as long as the block runs; with placement `sleep` the engine sleeps meanwhile.

    Raises StageFailedError where the engine cannot sleep, ServerGoneError, CycleCancelledError.
    """
    if cycle.config.train.placement != "sleep":
        yield Device(None)
        return
    progress.say("the engine ends its requests and goes to sleep")
    is_asleep = asyncio.Event()
    asleep = asyncio.create_task(_sleep(cycle, is_asleep), name="engine asleep")
    waits = [asyncio.create_task(is_asleep.wait()), asyncio.create_task(cycle.cancelled.wait())]
    try:
        await asyncio.wait({asleep, *waits}, return_when=asyncio.FIRST_COMPLETED)
        cycle.check()
        if asleep.done():
            asleep.result()
        device = Device(asleep)
        device.check()
        logger.info("event=device_lent cycle=%s", cycle.id)
        yield device
    finally:
        for task in (asleep, *waits):
            task.cancel()
        await asyncio.gather(asleep, *waits, return_exceptions=True)


async def _sleep(cycle: Cycle, is_asleep: asyncio.Event) -> None:
    reason = f"cycle {cycle.id} trains"
    try:
        async with aclosing(cycle.client.admin.placement.sleep_engine(reason=reason)) as told:
            async for _ in told:
                is_asleep.set()
    except AWAY as error:
        raise ServerGoneError(f"the engine was not put to sleep: {error}") from error
    except nightschool.FailedPreconditionError as error:
        raise StageFailedError(error.message) from error


async def adapter_from_elsewhere(cycle: Cycle, folder: RunFolder, progress: Progress) -> str:
    """Hand the run out and wait for its adapter; returns the name under which a trainer on another host sent it.

    Raises CycleCancelledError.
    """
    archive = run_file(cycle.home.cycles, cycle.id)
    name = _sent(cycle)
    if name is None and not archive.exists():
        await asyncio.to_thread(pack, folder, archive)
        logger.info("event=run_handed_out cycle=%s size_bytes=%d", cycle.id, archive.stat().st_size)
    progress.say("waits for a trainer: `nightschool train --address THIS_SERVER` on another host")
    while (name := _sent(cycle)) is None:
        cycle.check()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(cycle.cancelled.wait(), POLL_S)
    archive.unlink(missing_ok=True)
    return name


def alarms_of(cycle: Cycle, name: str) -> list[Alarm]:
    """What the other host's trainer gave alarm of, from the adapter's manifest."""
    row = cycle.store.one("SELECT manifest FROM adapters WHERE name = ?", (name,))
    training = (json.loads(row["manifest"]) if row else {}).get("training") or {}
    return [Alarm.model_validate(alarm) for alarm in training.get("alarms", ())]


def _sent(cycle: Cycle) -> str | None:
    row = cycle.store.one(
        "SELECT name FROM adapters WHERE cycle_id = ? AND deleted_at IS NULL ORDER BY sequence", (cycle.id,)
    )
    return None if row is None else str(row["name"])
