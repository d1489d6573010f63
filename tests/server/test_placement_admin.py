"""SleepEngine and ExportRun over the wire: the device comes back however the call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from nightschool_proto.v1 import admin_pb2
from nightschool_server.engine import GenerateRequest
from nightschool_server.service.placement_admin import run_file

from tests.harness import Running, Stubs, ask, failure, server_thread
from tests.server.scripted_engine import ScriptedEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class Sleepy:
    """A server on an engine that can sleep."""

    server: Running
    engine: ScriptedEngine


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sleepy]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    with server_thread(tmp_path_factory.mktemp("sleepy") / "home", engine=start) as server:
        yield Sleepy(server, engine)


@pytest.fixture
async def wire(sleepy: Sleepy) -> AsyncIterator[Stubs]:
    async with sleepy.server.stubs() as found:
        yield found


async def until(watch: object, status: int) -> None:
    """Read health until it says so."""
    async with asyncio.timeout(120):
        while (await watch.read()).status != status:  # type: ignore[attr-defined]
            pass


async def test_calls_are_unavailable_while_the_engine_sleeps_and_served_when_the_caller_leaves(
    sleepy: Sleepy, wire: Stubs
) -> None:
    admin = sleepy.server.admin
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="nightschool.v1.AgentService"))
    await until(watch, SERVING)
    sleeping = wire.admin.SleepEngine(admin_pb2.SleepEngineRequest(reason="a test"), metadata=admin)
    first = await sleeping.read()
    assert first.seconds_asleep < 5
    await until(watch, NOT_SERVING)
    found = await failure(wire.agent.Generate(ask("hi"), metadata=admin))
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_ASLEEP")
    assert found.retry_after_s == 15.0
    status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=admin)
    assert not status.healthy
    assert (await sleeping.read()).seconds_asleep > first.seconds_asleep
    sleeping.cancel()
    await until(watch, SERVING)
    assert (await wire.agent.Generate(ask("hi"), metadata=admin)).answers[0].text == "fine."


async def test_calls_in_flight_are_answered_before_the_engine_sleeps(sleepy: Sleepy, wire: Stubs) -> None:
    admin, engine = sleepy.server.admin, sleepy.engine
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service=""))
    await until(watch, SERVING)
    loops: list[asyncio.AbstractEventLoop] = []

    def script(request: GenerateRequest) -> str:
        loops.append(asyncio.get_running_loop())
        return "a long answer"

    engine.script, engine.gate = script, asyncio.Event()
    try:
        answer = wire.agent.StreamGenerate(ask("hi"), metadata=admin)
        while not (await answer.read()).HasField("delta"):
            pass
        sleeping = wire.admin.SleepEngine(admin_pb2.SleepEngineRequest(), metadata=admin)
        first = asyncio.ensure_future(sleeping.read())
        await until(watch, NOT_SERVING)
        assert not engine.is_asleep
        assert (await failure(wire.agent.Generate(ask("late"), metadata=admin))).reason == "ENGINE_ASLEEP"
        second = wire.admin.SleepEngine(admin_pb2.SleepEngineRequest(), metadata=admin).read()
        assert (await failure(second)).code == grpc.StatusCode.FAILED_PRECONDITION
        loops[0].call_soon_threadsafe(engine.gate.set)
        texts = []
        while (event := await answer.read()) is not grpc.aio.EOF:
            texts.append(event.finished.text)
        assert "a long answer" in texts
        assert await answer.code() == grpc.StatusCode.OK
        await first
        assert engine.is_asleep
        sleeping.cancel()
        await until(watch, SERVING)
    finally:
        engine.gate = None


async def test_a_caller_whose_connection_is_gone_lets_the_engine_wake(sleepy: Sleepy, wire: Stubs) -> None:
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service=""))
    async with sleepy.server.stubs() as other:
        sleeping = other.admin.SleepEngine(admin_pb2.SleepEngineRequest(), metadata=sleepy.server.admin)
        await sleeping.read()
        await until(watch, NOT_SERVING)
    await until(watch, SERVING)


async def test_a_user_may_neither_put_the_engine_to_sleep_nor_fetch_runs(sleepy: Sleepy, wire: Stubs) -> None:
    for call in (
        wire.admin.SleepEngine(admin_pb2.SleepEngineRequest(), metadata=sleepy.server.user).read(),
        wire.admin.ExportRun(admin_pb2.ExportRunRequest(), metadata=sleepy.server.user).read(),
    ):
        assert (await failure(call)).code == grpc.StatusCode.PERMISSION_DENIED


async def test_the_transformers_engine_says_that_it_cannot_sleep(shop: Stubs, shop_server: Running) -> None:
    found = await failure(shop.admin.SleepEngine(admin_pb2.SleepEngineRequest(), metadata=shop_server.admin).read())
    assert found.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "learner.train.placement" in found.message


async def test_a_run_is_exported_in_chunks_and_only_where_one_waits(sleepy: Sleepy, wire: Stubs) -> None:
    admin, runtime = sleepy.server.admin, sleepy.server.runtime

    async def export(cycle_id: str = "") -> bytes:
        request = admin_pb2.ExportRunRequest(cycle_id=cycle_id)
        return b"".join([piece.chunk async for piece in wire.admin.ExportRun(request, metadata=admin)])

    assert (await failure(export())).code == grpc.StatusCode.FAILED_PRECONDITION
    assert (await failure(export("cycle_unknown"))).code == grpc.StatusCode.NOT_FOUND
    cycle = await wire.admin.TriggerCycle(admin_pb2.TriggerCycleRequest(), metadata=admin)
    found = await failure(export(cycle.id))
    assert found.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "waits for no trainer" in found.message
    archive = run_file(Path(runtime.home.cycles), cycle.id)
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"x" * 2_500_000)
    assert await export(cycle.id) == archive.read_bytes()
