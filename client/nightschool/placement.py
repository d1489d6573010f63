"""Training on another device's terms: the engine sleeps for it, or another host does it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from nightschool_proto.v1 import admin_pb2

from nightschool.blocking import blocking_iterator
from nightschool.caller import Caller
from nightschool.config import MAX_TIMEOUT_S
from nightschool.methods import EXPORT_RUN, SLEEP_ENGINE
from nightschool.records import RunChunk

SLOW_TIMEOUT_S = 600.0
"""Of calls that load, probe or copy an adapter, where they bring no timeout of their own."""


class AsyncPlacement:
    """Where training runs beside serving."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def sleep_engine(self, *, reason: str = "", timeout_s: float = MAX_TIMEOUT_S) -> AsyncGenerator[float, None]:
        """Have the engine leave its device: yields once it sleeps, then every few seconds; leaving the loop wakes it.

        The seconds that it has slept are yielded. Whoever calls the model meanwhile is told UNAVAILABLE and when to
        come back. Raises FailedPreconditionError where the engine cannot sleep, or sleeps already.
        """
        request = admin_pb2.SleepEngineRequest(reason=reason)
        responses = await self._caller.stream(SLEEP_ENGINE, request, timeout_s)
        try:
            while (response := await responses.next()) is not None:
                yield response.seconds_asleep
        finally:
            responses.cancel()

    async def export_run(
        self, cycle_id: str = "", *, timeout_s: float = SLOW_TIMEOUT_S
    ) -> AsyncGenerator[RunChunk, None]:
        """The training run of a cycle that waits for a trainer on another host, as chunks of a tar archive.

        Raises FailedPreconditionError where none waits.
        """
        responses = await self._caller.stream(EXPORT_RUN, admin_pb2.ExportRunRequest(cycle_id=cycle_id), timeout_s)
        try:
            while (response := await responses.next()) is not None:
                yield RunChunk(response.cycle_id, response.chunk)
        finally:
            responses.cancel()


class Placement:
    """Where training runs beside serving."""

    def __init__(self, inner: AsyncPlacement) -> None:
        self._inner = inner

    sleep_engine = blocking_iterator(AsyncPlacement.sleep_engine)
    export_run = blocking_iterator(AsyncPlacement.export_run)
