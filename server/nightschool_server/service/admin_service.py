"""AdminService: what operators and the learner call.

Owns the way from a method to what does the work, and idempotency: a write with a request_id that was answered before
gets the same reply. Adapters are `adapters/registry.py`'s (through `admin_adapters.py`), cycles `admin_cycles.py`'s,
lists `admin_records.py`'s and `admin_pairs.py`'s, the engine's device `placement_admin.py`'s. The scope was checked by
`interceptors.py`; who did what is in the audit trail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import grpc
from nightschool_proto.v1 import admin_pb2, admin_pb2_grpc

from nightschool_server.home import CORRECTIONS_FILE, THUMBS_FILE
from nightschool_server.runtime import Runtime
from nightschool_server.service import admin_pairs, admin_records
from nightschool_server.service.admin_adapters import AdapterAdmin
from nightschool_server.service.admin_cycles import CycleAdmin
from nightschool_server.service.admin_status import status_of
from nightschool_server.service.interceptors import current_caller
from nightschool_server.service.once import Once
from nightschool_server.service.pages import page_of
from nightschool_server.service.placement_admin import PlacementAdmin
from nightschool_server.service.replies import Replies
from nightschool_server.service.wire import bounded, identifier
from nightschool_server.store.forgetting import forget_user

Context = grpc.aio.ServicerContext[Any, Any]

EXPORT_CHUNK_BYTES = 256 * 1024

FEEDBACK_FILES = {
    admin_pb2.ExportPairsRequest.CORRECTIONS: CORRECTIONS_FILE,
    admin_pb2.ExportPairsRequest.THUMBS: THUMBS_FILE,
}
"""The learner's file of each kind of rows that is not of preferences."""


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The servicer of nightschool.v1.AdminService."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._adapters = AdapterAdmin(runtime.registry)
        self._cycles = CycleAdmin(runtime.store, runtime.config.learner)
        self._placement = PlacementAdmin(runtime)
        self._once = Once(Replies(runtime.store))

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.GetStatusResponse:
        """The server as a whole."""
        return status_of(self._runtime, self._cycles.learner_status())

    async def ListAdapters(
        self, request: admin_pb2.ListAdaptersRequest, context: Context
    ) -> admin_pb2.ListAdaptersResponse:
        """Adapters, newest first."""
        adapters, token = self._adapters.list(request)
        return admin_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def GetAdapter(self, request: admin_pb2.GetAdapterRequest, context: Context) -> admin_pb2.Adapter:
        """One adapter with its evaluation and its audit trail."""
        return self._adapters.get(request.name)

    async def ImportAdapter(self, request: admin_pb2.ImportAdapterRequest, context: Context) -> admin_pb2.Adapter:
        """Takes an adapter in as a candidate."""
        return await self._once(request, admin_pb2.Adapter, lambda: self._adapters.import_(_actor(), request))

    async def PromoteAdapter(self, request: admin_pb2.PromoteAdapterRequest, context: Context) -> admin_pb2.RouteChange:
        """Makes an adapter the active one."""
        return await self._once(request, admin_pb2.RouteChange, lambda: self._adapters.promote(_actor(), request))

    async def RollbackAdapter(
        self, request: admin_pb2.RollbackAdapterRequest, context: Context
    ) -> admin_pb2.RouteChange:
        """Moves the active pointer back."""
        return await self._once(request, admin_pb2.RouteChange, lambda: self._adapters.rollback(_actor(), request))

    async def RejectAdapter(self, request: admin_pb2.RejectAdapterRequest, context: Context) -> admin_pb2.Adapter:
        """Marks a candidate that did not pass the gate."""
        return await self._once(request, admin_pb2.Adapter, lambda: self._adapters.reject(_actor(), request))

    async def DeleteAdapter(
        self, request: admin_pb2.DeleteAdapterRequest, context: Context
    ) -> admin_pb2.DeleteAdapterResponse:
        """Removes an adapter that nobody uses."""
        return await self._once(
            request, admin_pb2.DeleteAdapterResponse, lambda: self._adapters.delete(_actor(), request)
        )

    async def TriggerCycle(self, request: admin_pb2.TriggerCycleRequest, context: Context) -> admin_pb2.Cycle:
        """Queues a cycle for the learner."""

        async def trigger() -> admin_pb2.Cycle:
            return self._cycles.trigger(_actor(), bounded(request.reason, "reason"), list(request.overrides))

        return await self._once(request, admin_pb2.Cycle, trigger)

    async def ListCycles(self, request: admin_pb2.ListCyclesRequest, context: Context) -> admin_pb2.ListCyclesResponse:
        """Cycles, newest first."""
        page = page_of(request, "cycles")
        cycles, token = await asyncio.to_thread(admin_records.list_cycles, self._runtime.store, page)
        return admin_pb2.ListCyclesResponse(cycles=cycles, next_page_token=token)

    async def GetCycle(self, request: admin_pb2.GetCycleRequest, context: Context) -> admin_pb2.Cycle:
        """One cycle as it is now."""
        return self._cycles.get(request.id)

    async def WatchCycle(
        self, request: admin_pb2.WatchCycleRequest, context: Context
    ) -> AsyncIterator[admin_pb2.Cycle]:
        """One cycle now, then at every change, until it has ended."""
        async with aclosing(self._cycles.watch(request.id)) as cycles:
            async for cycle in cycles:
                yield cycle

    async def GetCycleReport(
        self, request: admin_pb2.GetCycleReportRequest, context: Context
    ) -> AsyncIterator[admin_pb2.GetCycleReportResponse]:
        """The report of a cycle that has ended."""
        kind = "json" if request.format == admin_pb2.GetCycleReportRequest.JSON else "html"
        path = await self._cycles.report(identifier(request.id, "id"), kind)
        whole = await asyncio.to_thread(path.read_bytes)
        for start in range(0, len(whole), EXPORT_CHUNK_BYTES):
            yield admin_pb2.GetCycleReportResponse(chunk=whole[start : start + EXPORT_CHUNK_BYTES])

    async def CancelCycle(self, request: admin_pb2.CancelCycleRequest, context: Context) -> admin_pb2.Cycle:
        """Asks the learner to stop a cycle."""
        return self._cycles.cancel(_actor(), request.id, bounded(request.reason, "reason"))

    async def PauseLearner(self, request: admin_pb2.PauseLearnerRequest, context: Context) -> admin_pb2.LearnerStatus:
        """Holds the learner between two units of work."""
        return self._cycles.pause(_actor(), bounded(request.reason, "reason"), paused=True)

    async def ResumeLearner(self, request: admin_pb2.ResumeLearnerRequest, context: Context) -> admin_pb2.LearnerStatus:
        """Lets the learner go on."""
        return self._cycles.pause(_actor(), "", paused=False)

    async def SleepEngine(
        self, request: admin_pb2.SleepEngineRequest, context: Context
    ) -> AsyncIterator[admin_pb2.SleepEngineResponse]:
        """The engine leaves its device until the call ends."""
        async with aclosing(self._placement.sleep(_actor(), bounded(request.reason, "reason"))) as told:
            async for response in told:
                yield response

    async def ExportRun(
        self, request: admin_pb2.ExportRunRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ExportRunResponse]:
        """A training run for another host."""
        async with aclosing(self._placement.export(identifier(request.cycle_id, "cycle_id"))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def ListTasks(self, request: admin_pb2.ListTasksRequest, context: Context) -> admin_pb2.ListTasksResponse:
        """Tasks that the learner wrote, kept and dropped."""
        page = page_of(request, f"tasks:{request.cycle_id}")
        tasks, token = await asyncio.to_thread(admin_records.list_tasks, self._runtime.store, page, request.cycle_id)
        return admin_pb2.ListTasksResponse(tasks=tasks, next_page_token=token)

    async def ListPairs(self, request: admin_pb2.ListPairsRequest, context: Context) -> admin_pb2.ListPairsResponse:
        """Preference pairs."""
        page = page_of(request, f"pairs:{request.cycle_id}")
        pairs, token = await asyncio.to_thread(admin_pairs.list_pairs, self._runtime.store, page, request.cycle_id)
        return admin_pb2.ListPairsResponse(pairs=pairs, next_page_token=token)

    async def GetPair(self, request: admin_pb2.GetPairRequest, context: Context) -> admin_pb2.PairDetail:
        """One preference pair with all that it rests on."""
        pair_id = identifier(request.id, "id")
        return await asyncio.to_thread(admin_pairs.get_pair, self._runtime.store, pair_id)

    async def ExportPairs(
        self, request: admin_pb2.ExportPairsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ExportPairsResponse]:
        """JSON lines in TRL's conversational preference format, in chunks that end with a line."""
        lines = self._exported(request)
        while chunk := await asyncio.to_thread(_next_chunk, lines):
            yield admin_pb2.ExportPairsResponse(chunk=chunk)

    def _exported(self, request: admin_pb2.ExportPairsRequest) -> Iterator[str]:
        runtime = self._runtime
        if name := FEEDBACK_FILES.get(request.rows):
            return admin_pairs.export_feedback(runtime.home, runtime.store, name, request.cycle_id)
        tools = runtime.action_format.shown(runtime.tools.tools)
        return admin_pairs.export_pairs(runtime.store, request.cycle_id, tools)

    async def ForgetUser(self, request: admin_pb2.ForgetUserRequest, context: Context) -> admin_pb2.ForgetUserResponse:
        """Erases every logged request of a caller, and what was derived from it."""

        async def forget() -> admin_pb2.ForgetUserResponse:
            num_requests = await forget_user(self._runtime, _actor(), request.user)
            return admin_pb2.ForgetUserResponse(num_requests=num_requests)

        return await self._once(request, admin_pb2.ForgetUserResponse, forget)


def _actor() -> str:
    """Who is on the record for what the current call changes."""
    return current_caller().name


def _next_chunk(lines: Iterator[str]) -> bytes:
    """Whole lines of about a chunk's size; empty at the end."""
    chunk = bytearray()
    for line in lines:
        chunk += line.encode()
        if len(chunk) >= EXPORT_CHUNK_BYTES:
            break
    return bytes(chunk)
