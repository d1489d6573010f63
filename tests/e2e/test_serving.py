"""A real server process: what it acknowledged survives SIGKILL, SIGTERM lets calls end, nothing outlives it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2
from nightschool_proto.v1 import admin_pb2, agent_pb2

from tests.harness import SHOP_MODEL, ServerProcess, Stubs, ask, stubs
from tests.server.tiny_models import make_adapter

APP = ("--app", "examples.shop.app:app")
GONE_S = 60.0


async def acknowledged(wire: Stubs, admin: Any, folder: Path) -> dict[str, Any]:
    """Writes of every kind, each answered."""
    adapter = await wire.admin.ImportAdapter(admin_pb2.ImportAdapterRequest(path=str(folder)), metadata=admin)
    promotion = admin_pb2.PromoteAdapterRequest(name=adapter.name, reason="a test", force=True)
    await wire.admin.PromoteAdapter(promotion, metadata=admin)
    request = ask("hi", temperature=1.0, request_id="r1", session_id="s1")
    reply = await wire.agent.Generate(request, metadata=admin)
    feedback = agent_pb2.RecordFeedbackRequest(response_id=reply.response_id, good=False, request_id="f1")
    given = await wire.agent.RecordFeedback(feedback, metadata=admin)
    await wire.admin.PauseLearner(admin_pb2.PauseLearnerRequest(reason="a test"), metadata=admin)
    cycle = await wire.admin.TriggerCycle(admin_pb2.TriggerCycleRequest(reason="a test"), metadata=admin)
    return {
        "adapter": adapter.name,
        "request": request,
        "reply": reply,
        "feedback": feedback,
        "given": given,
        "cycle": cycle.id,
    }


async def check(wire: Stubs, admin: Any, known: dict[str, Any]) -> None:
    """Everything in `known` is still so."""
    status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=admin)
    assert (status.active_adapter, status.previous_adapter) == (known["adapter"], "base")
    assert (status.log.num_requests, status.log.num_feedback) == (1, 1)
    assert status.learner.paused
    assert await wire.agent.Generate(known["request"], metadata=admin) == known["reply"]
    assert await wire.agent.RecordFeedback(known["feedback"], metadata=admin) == known["given"]
    cycle = await wire.admin.GetCycle(admin_pb2.GetCycleRequest(id=known["cycle"]), metadata=admin)
    assert cycle.state == admin_pb2.Cycle.QUEUED
    assert (await wire.agent.Generate(ask("hi"), metadata=admin)).adapter == known["adapter"]


@pytest.mark.timeout(400)
async def test_what_was_acknowledged_survives_sigkill_and_sigterm_drains(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ServerProcess(home, *APP) as server:
        async with stubs(server.address) as wire:
            known = await acknowledged(wire, server.admin, make_adapter(SHOP_MODEL, tmp_path / "adapter", 1))
        children = psutil.Process(server.pid).children(recursive=True)
        server.kill()
        assert (home / "server.json").exists(), "nothing was said goodbye to"
    # The learner and the tool workers do not outlive a server that could not stop them.
    assert children
    _, alive = psutil.wait_procs(children, timeout=GONE_S)
    assert alive == []

    with ServerProcess(home, *APP, "--no-learner", "--set", "server.drain_s=300") as server:
        async with stubs(server.address) as wire:
            await check(wire, server.admin, known)
            await drains(wire, server)
        assert server.wait() == 0
        assert not (home / "server.json").exists()


async def drains(wire: Stubs, server: ServerProcess) -> None:
    """A call in flight ends, health says so, a new call is refused; whoever only watches holds nothing up."""
    watch = wire.health.Watch(health_pb2.HealthCheckRequest(service="nightschool.v1.AgentService"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stream = wire.agent.StreamGenerate(ask("hi", max_tokens=200, ignore_eos=True), metadata=server.admin)
    await stream.read()
    server.terminate()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    refused = asyncio.ensure_future(until_refused(wire, server))
    events = []
    while (event := await stream.read()) is not grpc.aio.EOF:
        events.append(event)
    assert events[-1].usage.completion_tokens == 200
    # gRPC ends a call that it had taken, but not yet handed on, when the port closes as CANCELLED (see operations.md).
    assert (await refused) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def until_refused(wire: Stubs, server: ServerProcess) -> grpc.StatusCode:
    """The code with which new calls are refused; one on its way when the drain begins may still be taken."""
    while True:
        try:
            await wire.agent.Generate(ask("hi", max_tokens=1), metadata=server.admin, timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code()
