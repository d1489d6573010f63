"""The life of vLLM's core: started, proven, started again when it has died, put to sleep and woken.

Owns which core serves now. What every new core must be given (adapters, the merged one) is the engine's to know, and
comes as `bring_back`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from nightschool_server.engines.model_folder import ModelFolder
from nightschool_server.engines.on_vllm.core import VLLMEngineConfig, sleeps_in_place, start_core
from nightschool_server.engines.on_vllm.mixed_test import check_mixed_batches, fingerprint, largest_difference
from nightschool_server.engines.on_vllm.processes import CoreProcesses
from nightschool_server.errors import EngineAsleepError, EngineDeadError, FailedPreconditionError
from nightschool_server.uninterrupted import uninterrupted

log = logging.getLogger(__name__)

WATCH_S = 0.2
"""How often a core's life is looked at, seconds."""

MAX_WAKING_DIFFERENCE_NATS = 0.05
"""How far a woken core's logprobs may lie from those before it slept."""

DEAD = "the engine died and is being started again: try again"


class CoreLife:
    """Keeps one core serving; every change of it, or in it, is made under `change`."""

    def __init__(
        self, config: VLLMEngineConfig, folder: ModelFolder, bring_back: Callable[[Any], Awaitable[None]]
    ) -> None:
        self._config, self._folder, self._bring_back = config, folder, bring_back
        self.change = asyncio.Lock()
        self._core: Any = None
        self._processes = CoreProcesses((), ())
        self._is_asleep = False
        self._is_closed = False
        self._prints: list[list[float]] = []
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start a core and keep it alive. Raises ModelFormatError."""
        await self._open()
        self._watcher = asyncio.create_task(self._watch(), name="watch vLLM")

    def core(self) -> Any:
        """The core that serves. Raises EngineDeadError, EngineAsleepError."""
        if self._is_asleep:
            raise EngineAsleepError("the engine sleeps while its device trains an adapter: try again later")
        if self._core is None or self._core.errored:
            raise EngineDeadError(DEAD)
        return self._core

    def serves(self) -> bool:
        """Whether there is a core that serves."""
        return not self._is_asleep and self._core is not None and not self._core.errored

    async def sleep(self, until_idle: Callable[[], Awaitable[object]], numbers: list[int]) -> None:
        """Refuse new requests from now on, wait for those in flight, then give the memory back.

        `numbers` are adapters whose answers must be the same when it wakes. Raises FailedPreconditionError where it
        sleeps already, EngineDeadError where it has died.
        """
        if self._is_asleep:
            raise FailedPreconditionError("the engine sleeps already: whoever put it to sleep must wake it first")
        core = self.core()
        self._is_asleep = True
        try:
            await until_idle()
            async with self.change:
                await self._let_go(core, numbers)
        except BaseException:
            # The watch starts another one where there is none now.
            self._is_asleep = False
            raise
        log.info("event=engine_asleep engine=vllm in_place=%s", self._core is not None)

    async def wake(self, numbers: list[int]) -> None:
        """Serve again, proven; a core that does not wake as it was is started anew."""
        async with self.change:
            if not self._is_asleep or self._is_closed:
                return
            try:
                if self._core is None:
                    await self._open()
                else:
                    await self._wake_in_place(self._core, numbers)
            except Exception:
                log.exception("event=engine_did_not_wake remedy=restarting")
                await self._shut_down()
            finally:
                self._is_asleep = False
        log.info("event=engine_awake engine=vllm serves=%s", self.serves())

    async def close(self) -> None:
        """End the core; a start that is under way ends first."""
        self._is_closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        async with self.change:
            await self._shut_down()

    async def _let_go(self, core: Any, numbers: list[int]) -> None:
        """Give the memory back; a core that was interrupted half asleep is ended."""
        if not sleeps_in_place(self._config):
            await self._shut_down()
            return
        try:
            self._prints = [await fingerprint(core, number) for number in numbers]
            await core.sleep(level=1)
        except BaseException:
            await self._shut_down()
            raise

    async def _wake_in_place(self, core: Any, numbers: list[int]) -> None:
        await core.wake_up()
        for number, before in zip(numbers, self._prints, strict=True):
            difference = largest_difference(before, await fingerprint(core, number))
            if difference > MAX_WAKING_DIFFERENCE_NATS:
                raise EngineDeadError(f"adapter {number} answers {difference:.2g} nats apart from before the sleep")

    async def _open(self) -> None:
        """Start a core, prove it, and bring back what was loaded; it serves from then on."""
        core = await start_core(self._config, self._folder)
        processes = CoreProcesses.of(core)
        try:
            await call(core, "nightschool_open")
            if self._config.self_test:
                await check_mixed_batches(core, self._config)
            await self._bring_back(core)
        except BaseException:
            await uninterrupted(_end(core, processes))
            raise
        self._core, self._processes = core, processes

    async def _watch(self) -> None:
        """Start the core again whenever it has died."""
        pause_s = 1.0
        while True:
            await asyncio.sleep(WATCH_S)
            if self._is_asleep or self.serves():
                pause_s = 1.0
                continue
            log.error("event=engine_died engine=vllm remedy=restarting")
            async with self.change:
                await self._shut_down()
                try:
                    await self._open()
                    log.info("event=engine_restarted engine=vllm")
                except Exception:
                    log.exception("event=engine_restart_failed again_in_s=%g", pause_s)
                    await asyncio.sleep(pause_s)
                    pause_s = min(60.0, 2 * pause_s)

    async def _shut_down(self) -> None:
        """End the core; whoever comes after has its memory, which a cancellation does not change."""
        core, self._core = self._core, None
        if core is not None:
            await uninterrupted(_end(core, self._processes))


async def call(core: Any, method: str, *args: Any) -> None:
    """Have the worker run a method of `LaneExtension` between two steps. Raises EngineDeadError."""
    from vllm.v1.engine.exceptions import EngineDeadError as CoreDeadError

    try:
        await core.collective_rpc(method, args=args)
    except CoreDeadError as error:
        raise EngineDeadError(DEAD) from error


async def _end(core: Any, processes: CoreProcesses) -> None:
    if core.output_handler is not None:
        # It would take the end of the processes for their death.
        core.output_handler.cancel()
    await asyncio.to_thread(processes.end, core)
