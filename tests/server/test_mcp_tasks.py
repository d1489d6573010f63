"""One task over real gRPC that uses all three kinds of tools: functions, an MCP server's, the client's. The engine is
scripted; workers and the MCP server are real processes, which crash, hang and are killed on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import grpc
import pytest
from nightschool_proto.v1 import agent_pb2, content_pb2
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import GenerateRequest

from tests.harness import Running, Stubs, server_thread
from tests.server import mcp_probe
from tests.server.scripted_engine import ScriptedEngine

TEXT = json.dumps({"type": "object", "properties": {"question": {"type": "string"}}})
ASK = content_pb2.Tool(name="ask", description="Asks the person.", parameters_json=TEXT)
PID = write_call("probe.pid", {})


@dataclass
class World:
    """A server whose engine says the lines in order, and what it was asked with."""

    server: Running
    lines: list[str] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    settings = {"agent.app": "tests.server.mcp_app:app", "agent.max_steps": "20"}
    with server_thread(tmp_path_factory.mktemp("mcp") / "home", settings, start) as server:
        world = World(server, requests=engine.requests)
        engine.script = lambda request: world.lines[sum(m.role == "assistant" for m in request.prompt.messages)]
        yield world


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Stubs]:
    world.requests.clear()
    async with world.server.stubs() as found:
        yield found


async def run(world: World, wire: Stubs, *lines: str) -> list[agent_pb2.RunTaskResponse]:
    """Every event but text. The client's tool kills the process whose number it is asked about."""
    world.lines = [*lines, "done."]
    user = content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text="do it")])
    call = wire.agent.RunTask(metadata=world.server.user)
    await call.write(agent_pb2.RunTaskRequest(start=agent_pb2.TaskStart(messages=[user], client_tools=[ASK])))
    events: list[agent_pb2.RunTaskResponse] = []
    while (event := await call.read()) is not grpc.aio.EOF:
        if event.HasField("tool_request"):
            if (victim := json.loads(event.tool_request.arguments_json).get("question", "")).isdigit():
                os.kill(int(victim), signal.SIGKILL)
            result = content_pb2.ToolResult(call_id=event.tool_request.id, name="ask", content="asked")
            await call.write(agent_pb2.RunTaskRequest(tool_result=result))
        if not event.HasField("delta"):
            events.append(event)
    await call.done_writing()
    return events


def results(events: list[agent_pb2.RunTaskResponse]) -> list[content_pb2.ToolResult]:
    return [event.tool_result for event in events if event.HasField("tool_result")]


async def test_a_task_uses_the_three_kinds_of_tools_and_streams_its_events_in_order(world: World, wire: Stubs) -> None:
    echo, ask, crash = (
        write_call("probe.echo", {"text": "hello"}),
        write_call("ask", {"question": "how many?"}),
        write_call("crash", {"how": "fine"}),
    )
    events = await run(world, wire, echo, ask, crash)
    assert [event.WhichOneof("event") for event in events] == [
        *("started", "tool_call", "tool_result"),
        *("tool_call", "tool_request", "tool_result"),
        *("tool_call", "tool_result", "finished"),
    ]
    assert [(result.name, result.content) for result in results(events)] == [
        ("probe.echo", "hello"),
        ("ask", "asked"),
        ("crash", "fine"),
    ]
    assert events[-1].finished.answer == "done."
    names = [spec.name for spec in world.requests[0].prompt.tools]
    assert names[:3] == ["probe.echo", "ask", "crash"], "the application's order holds for the client's tool too"
    assert len(names) == 9


async def test_a_task_outlives_a_crash_a_hang_and_the_death_of_an_mcp_server(world: World, wire: Stubs) -> None:
    crash, hang = write_call("crash", {"how": "exit"}), write_call("hang", {})
    events = await run(world, wire, crash, hang, write_call("probe.kill", {}), write_call("probe.echo", {"text": "a"}))
    assert [result.content for result in results(events)] == [
        "error: the tool's process ended with exit code 1",
        "error: the tool did not end within 0.5 s and was killed",
        "error: the MCP server 'probe' ended (signal SIGKILL)",
        "a",
    ]
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.ANSWERED


async def test_an_mcp_server_that_someone_kills_is_started_again_within_the_task(world: World, wire: Stubs) -> None:
    (first,) = results(await run(world, wire, PID))
    events = await run(world, wire, write_call("ask", {"question": first.content}), PID, PID, PID)
    asked, *others = results(events)
    assert (asked.content, asked.is_error) == ("asked", False)
    # The one that found it dead may be an error; the next one has started it.
    assert [result.content for result in others if result.is_error] in (
        [],
        ["error: the MCP server 'probe' ended (signal SIGKILL)"],
    )
    assert others[-1].content.isdigit()
    assert others[-1].content == others[-2].content != first.content


async def test_the_model_sees_the_images_that_an_mcp_server_gives_back(world: World, wire: Stubs) -> None:
    events = await run(world, wire, write_call("probe.everything", {}))
    sha256 = hashlib.sha256(mcp_probe.PNG).hexdigest()
    assert [image.sha256 for image in results(events)[0].images] == [sha256]
    last = world.requests[-1].prompt
    assert last.messages[-1].images == (sha256,)
    assert last.images == {sha256: mcp_probe.PNG}
