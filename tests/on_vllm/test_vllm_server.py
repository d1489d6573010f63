"""A real server on vLLM: its engine is killed under calls in flight, sleeps, and is left behind by a killed server."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2

from tests.harness import SHOP_MODEL, ServerProcess, Stubs, ask, stubs
from tests.server.tiny_models import make_adapter

pytestmark = [pytest.mark.timeout(1200), pytest.mark.asyncio(loop_scope="module")]

START_S = 300.0
GONE_S = 60.0

_DAYS = {"type": "object", "properties": {"day": {"enum": ["Montag", "Mittwoch"]}}, "required": ["day"]}
BOOK = ask(
    "Book a table.",
    tools=[content_pb2.Tool(name="book", description="Books.", parameters_json=json.dumps(_DAYS), strict=True)],
    tool_choice=content_pb2.REQUIRED,
    max_tokens=60,
)


@dataclass(frozen=True)
class Served:
    """A server whose adapter serves, and what it answered first."""

    server: ServerProcess
    wire: Stubs
    before: agent_pb2.GenerateResponse
    """To "What is 12 plus 7?", of the adapter."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for all tests, in their order: the last one kills it."""
    home = tmp_path_factory.mktemp("served")
    with ServerProcess(home / "home", "--engine", "vllm", "--no-learner") as server:
        async with stubs(server.address) as wire:
            name = await promoted(wire, server.admin, make_adapter(SHOP_MODEL, home / "adapter", 1))
            before = await wire.agent.Generate(ask("What is 12 plus 7?"), metadata=server.admin)
            assert before.adapter == name
            yield Served(server, wire, before)


def engine_processes(server: ServerProcess) -> list[psutil.Process]:
    """EngineCore and its worker."""
    children = psutil.Process(server.pid).children(recursive=True)
    return [p for p in children if "VLLM::" in title(p)]


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing where it has just ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join((process.name(), *process.cmdline()))
    return ""


async def read_to_the_end(stream: Any) -> None:
    """Read a stream until it ends or fails."""
    while await stream.read() is not grpc.aio.EOF:
        pass


def details(error: grpc.aio.AioRpcError) -> list[Any]:
    """The messages of a status that say what and when."""
    found = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            found.ParseFromString(value if isinstance(value, bytes) else value.encode())
    return list(found.details)


async def promoted(wire: Stubs, admin: Any, folder: Path) -> str:
    """A new adapter, serving."""
    adapter = await wire.admin.ImportAdapter(admin_pb2.ImportAdapterRequest(path=str(folder)), metadata=admin)
    promotion = admin_pb2.PromoteAdapterRequest(name=adapter.name, reason="a test", force=True)
    await wire.admin.PromoteAdapter(promotion, metadata=admin)
    return str(adapter.name)


async def until(watch: Any, status: int) -> None:
    """Read health until it says so."""
    async with asyncio.timeout(START_S):
        while (await watch.read()).status != status:
            pass


async def test_a_killed_engine_is_unavailable_then_back_and_nothing_acknowledged_is_lost(served: Served) -> None:
    server, wire = served.server, served.wire
    question = ask("What is 12 plus 7?", request_id="r1")
    before = await wire.agent.Generate(question, metadata=server.admin)
    guided = await wire.agent.Generate(BOOK, metadata=server.admin)
    assert json.loads(guided.answers[0].tool_calls[0].arguments_json)["day"] in ("Montag", "Mittwoch")
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="nightschool.v1.AgentService"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stream = wire.agent.StreamGenerate(ask("hi", max_tokens=1500, ignore_eos=True), metadata=server.admin)
    await stream.read()
    core = next(p for p in engine_processes(server) if "EngineCore" in title(p))
    core.send_signal(signal.SIGKILL)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end(stream)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in details(caught.value))
    await until(watch, health_pb2.HealthCheckResponse.NOT_SERVING)
    status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=server.admin)
    assert (status.healthy, status.engine) == (False, "vllm")

    await until(watch, health_pb2.HealthCheckResponse.SERVING)
    assert await wire.agent.Generate(question, metadata=server.admin) == before, "answered once, for good"
    after = await wire.agent.Generate(ask("What is 12 plus 7?"), metadata=server.admin)
    assert (after.adapter, after.answers) == (before.adapter, before.answers)
    assert (await wire.agent.Generate(BOOK, metadata=server.admin)).answers == guided.answers
    # The server's first, two before, the one that died in flight, and two after; a repeat is not logged again.
    async with asyncio.timeout(START_S):
        while status.log.num_requests < 6:
            status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=server.admin)
    assert (status.healthy, status.log.num_requests) == (True, 6)


async def test_a_sleeping_engine_leaves_no_process_and_wakes_with_the_adapter_that_it_served(served: Served) -> None:
    server, wire = served.server, served.wire
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="nightschool.v1.AgentService"))
    long = wire.agent.StreamGenerate(ask("hi", max_tokens=400, ignore_eos=True), metadata=server.admin)
    while not (await long.read()).HasField("delta"):
        pass
    sleeping = wire.admin.SleepEngine(admin_pb2.SleepEngineRequest(reason="a test"), metadata=server.admin)
    asleep = asyncio.create_task(sleeping.read())
    await until(watch, health_pb2.HealthCheckResponse.NOT_SERVING)
    await read_to_the_end(long)
    assert long.done()
    assert await long.code() == grpc.StatusCode.OK, "what was in flight is answered to its end"
    assert (await asleep).seconds_asleep >= 0
    assert engine_processes(server) == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wire.agent.Generate(ask("hi"), metadata=server.admin)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in details(caught.value))

    sleeping.cancel()
    await until(watch, health_pb2.HealthCheckResponse.SERVING)
    after = await wire.agent.Generate(ask("What is 12 plus 7?"), metadata=server.admin)
    assert (after.adapter, after.answers) == (served.before.adapter, served.before.answers)


async def test_the_engine_does_not_outlive_a_server_that_could_not_stop_it(served: Served) -> None:
    left = engine_processes(served.server)
    assert len(left) == 2
    served.server.kill()
    _, alive = psutil.wait_procs(left, timeout=GONE_S)
    assert alive == []
