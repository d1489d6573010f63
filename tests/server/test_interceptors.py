"""What every call passes: who asks, may they, how long, how many, and what an error becomes. Real gRPC on port 0
in front of a servicer that does what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from nightschool_proto.v1 import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc, content_pb2
from nightschool_server import errors
from nightschool_server.auth import Caller
from nightschool_server.service.interceptors import CallInterceptor, Limits, current_caller

LIMITS = Limits(default_deadline_s=30, max_deadline_s=60, max_in_flight=2, max_message_bytes=1000)
USER = (("authorization", "Bearer user-token"),)
ADMIN = (("authorization", "bearer admin-token"),)


class TwoTokens:
    def authenticate(self, token: str) -> Caller:
        if token not in ("user-token", "admin-token"):
            raise errors.AuthenticationError("the token is not known")
        return Caller(token.removesuffix("-token"), "admin" if token == "admin-token" else "user")


async def nothing() -> None:
    pass


@dataclass
class Agent(agent_pb2_grpc.AgentServiceServicer):
    """Runs `act` inside every call."""

    act: Callable[[], Awaitable[None]] = nothing
    callers: list[str] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(self, request: Any, context: Any) -> agent_pb2.GenerateResponse:
        self.callers.append(current_caller().name)
        await self.act()
        return agent_pb2.GenerateResponse(response_id="resp_1")

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.StreamGenerateResponse]:
        try:
            yield agent_pb2.StreamGenerateResponse(started=agent_pb2.Started(response_id="resp_1"))
            await self.act()
            yield agent_pb2.StreamGenerateResponse(usage=content_pb2.Usage(prompt_tokens=1))
        finally:
            self.closed.set()

    async def RunTask(self, requests: Any, context: Any) -> AsyncIterator[agent_pb2.RunTaskResponse]:
        async for request in requests:
            yield agent_pb2.RunTaskResponse(delta=agent_pb2.Delta(text=request.start.adapter))


class Admin(admin_pb2_grpc.AdminServiceServicer):
    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(version="1")


@dataclass
class Guarded:
    agent: Agent
    stub: agent_pb2_grpc.AgentServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub
    interceptor: CallInterceptor


@asynccontextmanager
async def guarded(limits: Limits = LIMITS) -> AsyncIterator[Guarded]:
    agent, interceptor = Agent(), CallInterceptor(TwoTokens(), limits)
    server = grpc.aio.server(interceptors=[interceptor])
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Guarded(
            agent, agent_pb2_grpc.AgentServiceStub(channel), admin_pb2_grpc.AdminServiceStub(channel), interceptor
        )
    await server.stop(None)


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, Any]:
    """Code, message and rich status of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or "", caught.value


def reason(error: grpc.aio.AioRpcError) -> str:
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            assert status_pb2.Status.FromString(value).details[0].Unpack(info)
            return str(info.reason)
    return ""


async def test_a_call_without_a_token_or_with_an_unknown_one_is_unauthenticated() -> None:
    async with guarded() as server:
        for metadata in ((), (("authorization", "Bearer guess"),), (("authorization", "Basic dXNlcg=="),)):
            code, message, error = await failure(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert reason(error) == "UNAUTHENTICATED"
            assert "token" in message
        assert server.agent.callers == []


async def test_the_servicer_learns_who_called() -> None:
    async with guarded() as server:
        await asyncio.gather(
            server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER),
            server.stub.Generate(agent_pb2.GenerateRequest(), metadata=ADMIN),
        )
        assert sorted(server.agent.callers) == ["admin", "user"]


async def test_admin_methods_and_practice_priority_need_the_admin_scope() -> None:
    async with guarded() as server:
        code, message, _ = await failure(server.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=USER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "scope admin" in message
        assert (await server.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=ADMIN)).version == "1"
        practice = agent_pb2.GenerateRequest(priority=content_pb2.PRACTICE)
        code, _, _ = await failure(server.stub.Generate(practice, metadata=USER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        await server.stub.Generate(practice, metadata=ADMIN)


async def test_errors_of_the_servicer_leave_as_statuses_unary_and_streamed() -> None:
    async with guarded() as server:

        async def refuse() -> None:
            raise errors.InvalidRequestError("sampling.n", "sampling.n is 0")

        server.agent.act = refuse
        code, message, error = await failure(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER))
        assert (code, message, reason(error)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.n is 0",
            "INVALID_REQUEST",
        )
        stream = server.stub.StreamGenerate(agent_pb2.GenerateRequest(), metadata=USER)
        assert (await stream.read()).started.response_id == "resp_1"
        code, message, error = await failure(stream.read())
        assert (code, reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert server.interceptor.counters.num_failed == 0


async def test_a_bug_is_logged_with_its_traceback_and_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with guarded() as server:

        async def stumble() -> None:
            raise KeyError("secret")

        server.agent.act = stumble
        code, message, _ = await failure(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER))
        assert code is grpc.StatusCode.INTERNAL
        assert "secret" not in message
        call_id = message.rpartition(" ")[2]
        record = next(r for r in caplog.records if call_id in r.getMessage() and r.exc_info)
        assert "KeyError" in str(record.exc_info)
        assert server.interceptor.counters.num_failed == 1


async def test_more_calls_than_the_limit_are_refused_with_a_time_to_come_back() -> None:
    async with guarded() as server:
        entered, leave = asyncio.Semaphore(0), asyncio.Event()

        async def wait() -> None:
            entered.release()
            await leave.wait()

        server.agent.act = wait
        running = [
            asyncio.ensure_future(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER)) for _ in range(2)
        ]
        for _ in running:
            await entered.acquire()
        _, _, error = await failure(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(error) == "OVERLOADED"
        # Practice and admin have places of their own.
        practice = server.stub.Generate(agent_pb2.GenerateRequest(priority=content_pb2.PRACTICE), metadata=ADMIN)
        await server.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=ADMIN)
        leave.set()
        await asyncio.gather(*running, practice)
        assert set(server.interceptor.counters.num_in_flight.values()) == {0}
        assert server.interceptor.counters.num_served == 3


async def test_the_servers_deadline_ends_a_call_that_brought_none() -> None:
    limits = Limits(default_deadline_s=0.05, max_deadline_s=0.05, max_in_flight=2, max_message_bytes=1000)
    async with guarded(limits) as server:
        server.agent.act = asyncio.Event().wait  # type: ignore[assignment]
        code, message, error = await failure(server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "server.default_deadline_s" in message
        assert reason(error) == "DEADLINE_EXCEEDED"
        capped = server.stub.Generate(agent_pb2.GenerateRequest(), metadata=USER, timeout=20)
        code, message, _ = await failure(capped)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "server.max_deadline_s" in message


async def test_a_cancelled_stream_closes_the_servicers_generator() -> None:
    async with guarded() as server:
        server.agent.act = asyncio.Event().wait  # type: ignore[assignment]
        stream = server.stub.StreamGenerate(agent_pb2.GenerateRequest(), metadata=USER)
        await stream.read()
        stream.cancel()
        await asyncio.wait_for(server.agent.closed.wait(), 60)
        assert server.interceptor.counters.num_in_flight["live"] == 0


async def test_a_message_over_the_limit_is_refused_by_size() -> None:
    async with guarded() as server:
        big = agent_pb2.GenerateRequest(adapter="x" * 2000)
        code, message, _ = await failure(server.stub.Generate(big, metadata=USER))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "server.max_message_bytes" in message


async def test_a_bidirectional_call_passes_both_ways() -> None:
    async with guarded() as server:
        call = server.stub.RunTask(metadata=USER)
        for name in ("a", "b"):
            await call.write(agent_pb2.RunTaskRequest(start=agent_pb2.TaskStart(adapter=name)))
            assert (await call.read()).delta.text == name
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
