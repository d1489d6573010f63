"""What operators call: one namespace per thing, each with the calls of `AdminService` about it.

The `Async...` classes are the implementation, the others the same calls blocking. Lists are iterators that fetch page
after page. Writes take an optional `request_id`: the same id again is the same write.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

from nightschool_proto.v1 import admin_pb2

from nightschool.blocking import blocking, blocking_iterator
from nightschool.caller import Caller
from nightschool.config import MAX_TIMEOUT_S
from nightschool.convert import from_proto
from nightschool.errors import InvalidRequestError
from nightschool.methods import (
    CANCEL_CYCLE,
    DELETE_ADAPTER,
    EXPORT_PAIRS,
    FORGET_USER,
    GET_ADAPTER,
    GET_CYCLE,
    GET_CYCLE_REPORT,
    GET_PAIR,
    GET_STATUS,
    IMPORT_ADAPTER,
    LIST_ADAPTERS,
    LIST_CYCLES,
    LIST_PAIRS,
    LIST_TASKS,
    PAUSE_LEARNER,
    PROMOTE_ADAPTER,
    REJECT_ADAPTER,
    RESUME_LEARNER,
    ROLLBACK_ADAPTER,
    TRIGGER_CYCLE,
    WATCH_CYCLE,
)
from nightschool.options import new_request_id
from nightschool.pair_records import PairDetail
from nightschool.placement import SLOW_TIMEOUT_S, AsyncPlacement, Placement
from nightschool.records import Adapter, AdapterState, Cycle, LearnerStatus, Pair, RouteChange, Status, Task

PAGE_SIZE = 100


class AsyncAdapters:
    """Adapters and which of them is active."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(
        self, *, state: AdapterState | str | None = None, page_size: int = PAGE_SIZE
    ) -> AsyncGenerator[Adapter, None]:
        """Every adapter, newest first, or those in one state."""
        request = admin_pb2.ListAdaptersRequest(page_size=page_size, state=_state(state))
        async for page in self._caller.pages(LIST_ADAPTERS, request):
            for adapter in page.adapters:
                yield from_proto(Adapter, adapter)

    async def get(self, name: str) -> Adapter:
        """One adapter, with its evaluation and its audit trail."""
        return from_proto(Adapter, await self._caller.unary(GET_ADAPTER, admin_pb2.GetAdapterRequest(name=name)))

    async def import_(
        self,
        path: str = "",
        *,
        files: Mapping[str, bytes] | None = None,
        parent: str = "",
        reason: str = "",
        request_id: str | None = None,
        timeout_s: float | None = SLOW_TIMEOUT_S,
    ) -> Adapter:
        """Take a PEFT adapter into the registry as a candidate.

        `path` is a folder on the server's machine; `files` are the bytes of `adapter_config.json` and
        `adapter_model.safetensors` instead.
        """
        request = admin_pb2.ImportAdapterRequest(
            path=path, files=files or {}, parent=parent, reason=reason, request_id=request_id or new_request_id()
        )
        return from_proto(Adapter, await self._caller.unary(IMPORT_ADAPTER, request, timeout_s))

    async def promote(
        self,
        name: str,
        *,
        reason: str = "",
        force: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = SLOW_TIMEOUT_S,
    ) -> RouteChange:
        """Make an adapter the active one. `force` skips the gate, on the record."""
        request = admin_pb2.PromoteAdapterRequest(
            name=name, reason=reason, force=force, request_id=request_id or new_request_id()
        )
        return from_proto(RouteChange, await self._caller.unary(PROMOTE_ADAPTER, request, timeout_s))

    async def rollback(
        self,
        to: str = "",
        *,
        reason: str = "",
        request_id: str | None = None,
        timeout_s: float | None = SLOW_TIMEOUT_S,
    ) -> RouteChange:
        """Make the adapter that was active before, or the named one, the active one again."""
        request = admin_pb2.RollbackAdapterRequest(to=to, reason=reason, request_id=request_id or new_request_id())
        return from_proto(RouteChange, await self._caller.unary(ROLLBACK_ADAPTER, request, timeout_s))

    async def reject(self, name: str, *, reason: str = "", request_id: str | None = None) -> Adapter:
        """Mark a candidate that did not pass the gate."""
        request = admin_pb2.RejectAdapterRequest(name=name, reason=reason, request_id=request_id or new_request_id())
        return from_proto(Adapter, await self._caller.unary(REJECT_ADAPTER, request))

    async def delete(self, name: str, *, request_id: str | None = None) -> None:
        """Remove an adapter that is neither active nor held by a request."""
        request = admin_pb2.DeleteAdapterRequest(name=name, request_id=request_id or new_request_id())
        await self._caller.unary(DELETE_ADAPTER, request)


class AsyncCycles:
    """Learning cycles."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(self, *, page_size: int = PAGE_SIZE) -> AsyncGenerator[Cycle, None]:
        """Every cycle, newest first."""
        request = admin_pb2.ListCyclesRequest(page_size=page_size)
        async for page in self._caller.pages(LIST_CYCLES, request):
            for cycle in page.cycles:
                yield from_proto(Cycle, cycle)

    async def get(self, id: str) -> Cycle:
        """One cycle, with its stages and its evaluation."""
        return from_proto(Cycle, await self._caller.unary(GET_CYCLE, admin_pb2.GetCycleRequest(id=id)))

    async def trigger(self, *, reason: str = "", overrides: Sequence[str] = (), request_id: str | None = None) -> Cycle:
        """Practise now. `overrides` are `key=value` settings of the learner for this cycle alone."""
        request = admin_pb2.TriggerCycleRequest(
            reason=reason, overrides=overrides, request_id=request_id or new_request_id()
        )
        return from_proto(Cycle, await self._caller.unary(TRIGGER_CYCLE, request))

    async def watch(self, id: str, *, timeout_s: float = MAX_TIMEOUT_S) -> AsyncGenerator[Cycle, None]:
        """The cycle now, then at every change, until it has ended."""
        responses = await self._caller.stream(WATCH_CYCLE, admin_pb2.WatchCycleRequest(id=id), timeout_s)
        try:
            while (cycle := await responses.next()) is not None:
                yield from_proto(Cycle, cycle)
        finally:
            responses.cancel()

    async def report(self, id: str, *, format: str = "html", timeout_s: float = SLOW_TIMEOUT_S) -> bytes:
        """What a cycle that has ended did and why: one page of HTML that needs nothing else, or the same as JSON."""
        known = admin_pb2.GetCycleReportRequest.Format.keys()[1:]
        if format.upper() not in known:
            raise InvalidRequestError(f"format is {format!r}, but must be html or json", field="format")
        kind = admin_pb2.GetCycleReportRequest.Format.Value(format.upper())
        request = admin_pb2.GetCycleReportRequest(id=id, format=kind)
        responses, whole = await self._caller.stream(GET_CYCLE_REPORT, request, timeout_s), bytearray()
        try:
            while (response := await responses.next()) is not None:
                whole += response.chunk
        finally:
            responses.cancel()
        return bytes(whole)

    async def cancel(self, id: str, *, reason: str = "") -> Cycle:
        """End a cycle early; nothing of it is promoted."""
        request = admin_pb2.CancelCycleRequest(id=id, reason=reason)
        return from_proto(Cycle, await self._caller.unary(CANCEL_CYCLE, request))


class AsyncLearner:
    """The learner process."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def pause(self, *, reason: str = "") -> LearnerStatus:
        """Begin no cycle until `resume`."""
        request = admin_pb2.PauseLearnerRequest(reason=reason)
        return from_proto(LearnerStatus, await self._caller.unary(PAUSE_LEARNER, request))

    async def resume(self) -> LearnerStatus:
        """Begin cycles again."""
        response = await self._caller.unary(RESUME_LEARNER, admin_pb2.ResumeLearnerRequest())
        return from_proto(LearnerStatus, response)


class AsyncAdmin:
    """Everything that needs the admin scope."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.adapters = AsyncAdapters(caller)
        self.cycles = AsyncCycles(caller)
        self.learner = AsyncLearner(caller)
        self.placement = AsyncPlacement(caller)

    async def status(self) -> Status:
        """The server, its engine, its log and its learner."""
        return from_proto(Status, await self._caller.unary(GET_STATUS, admin_pb2.GetStatusRequest()))

    async def tasks(self, *, cycle_id: str = "", page_size: int = PAGE_SIZE) -> AsyncGenerator[Task, None]:
        """The tasks that the learner wrote, of one cycle or of all."""
        request = admin_pb2.ListTasksRequest(cycle_id=cycle_id, page_size=page_size)
        async for page in self._caller.pages(LIST_TASKS, request):
            for task in page.tasks:
                yield from_proto(Task, task)

    async def pairs(self, *, cycle_id: str = "", page_size: int = PAGE_SIZE) -> AsyncGenerator[Pair, None]:
        """The preference pairs, of one cycle or of all."""
        request = admin_pb2.ListPairsRequest(cycle_id=cycle_id, page_size=page_size)
        async for page in self._caller.pages(LIST_PAIRS, request):
            for pair in page.pairs:
                yield from_proto(Pair, pair)

    async def pair(self, id: str) -> PairDetail:
        """One preference pair with all that it rests on."""
        return from_proto(PairDetail, await self._caller.unary(GET_PAIR, admin_pb2.GetPairRequest(id=id)))

    async def export_pairs(
        self, *, cycle_id: str = "", rows: str = "preferences", timeout_s: float = SLOW_TIMEOUT_S
    ) -> AsyncGenerator[bytes, None]:
        """Training rows as JSON lines in TRL's conversational formats, in chunks of bytes.

        `rows` are preferences (the pairs), corrections (prompt and completion) or thumbs (with a label).
        """
        known = admin_pb2.ExportPairsRequest.Rows.keys()[1:]
        if rows.upper() not in known:
            names = ", ".join(known).lower()
            raise InvalidRequestError(f"rows is {rows!r}, but must be one of {names}", field="rows")
        kind = admin_pb2.ExportPairsRequest.Rows.Value(rows.upper())
        request = admin_pb2.ExportPairsRequest(cycle_id=cycle_id, rows=kind)
        responses = await self._caller.stream(EXPORT_PAIRS, request, timeout_s)
        try:
            while (response := await responses.next()) is not None:
                yield response.chunk
        finally:
            responses.cancel()

    async def forget_user(self, user: str, *, request_id: str | None = None) -> int:
        """Erase every logged request of a token's name and what was derived from it; returns how many there were."""
        request = admin_pb2.ForgetUserRequest(user=user, request_id=request_id or new_request_id())
        return (await self._caller.unary(FORGET_USER, request)).num_requests


class Adapters:
    """Adapters and which of them is active."""

    def __init__(self, inner: AsyncAdapters) -> None:
        self._inner = inner

    list = blocking_iterator(AsyncAdapters.list)
    get = blocking(AsyncAdapters.get)
    import_ = blocking(AsyncAdapters.import_)
    promote = blocking(AsyncAdapters.promote)
    rollback = blocking(AsyncAdapters.rollback)
    reject = blocking(AsyncAdapters.reject)
    delete = blocking(AsyncAdapters.delete)


class Cycles:
    """Learning cycles."""

    def __init__(self, inner: AsyncCycles) -> None:
        self._inner = inner

    list = blocking_iterator(AsyncCycles.list)
    get = blocking(AsyncCycles.get)
    trigger = blocking(AsyncCycles.trigger)
    watch = blocking_iterator(AsyncCycles.watch)
    report = blocking(AsyncCycles.report)
    cancel = blocking(AsyncCycles.cancel)


class Learner:
    """The learner process."""

    def __init__(self, inner: AsyncLearner) -> None:
        self._inner = inner

    pause = blocking(AsyncLearner.pause)
    resume = blocking(AsyncLearner.resume)


class Admin:
    """Everything that needs the admin scope."""

    def __init__(self, inner: AsyncAdmin) -> None:
        self._inner = inner
        self.adapters = Adapters(inner.adapters)
        self.cycles = Cycles(inner.cycles)
        self.learner = Learner(inner.learner)
        self.placement = Placement(inner.placement)

    status = blocking(AsyncAdmin.status)
    tasks = blocking_iterator(AsyncAdmin.tasks)
    pairs = blocking_iterator(AsyncAdmin.pairs)
    pair = blocking(AsyncAdmin.pair)
    export_pairs = blocking_iterator(AsyncAdmin.export_pairs)
    forget_user = blocking(AsyncAdmin.forget_user)


def _state(state: str | None) -> admin_pb2.Adapter.State.ValueType:
    if state is None:
        return admin_pb2.Adapter.STATE_UNSPECIFIED
    known = [member.value for member in AdapterState if member is not AdapterState.UNSPECIFIED]
    if state not in known:
        raise InvalidRequestError(f"state is {state!r}, but must be one of {', '.join(known)}", field="state")
    return admin_pb2.Adapter.State.Value(str(state).upper())
