"""RunTask over the wire: the application's tools, the client's tools, limits, cancellation, repeats. The engine is
scripted; tools run in real worker processes, everything else is the real server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import GenerateRequest

from tests.harness import Running, Stubs, failure, server_thread
from tests.server.scripted_engine import ScriptedEngine

APP = "tests.server.tools_app:app"
ADD = write_call("add", {"a": 2, "b": 3})
ASK = write_call("ask_client", {"question": "how many?"})
CLIENT_TOOL = content_pb2.Tool(
    name="ask_client",
    description="asks the person at the other end",
    parameters_json=json.dumps(
        {"type": "object", "properties": {"question": {"type": "string"}}, "required": ["question"]}
    ),
)
FINAL = "the answer is there."


@dataclass
class World:
    """A server whose engine does as it is told."""

    server: Running
    engine: ScriptedEngine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    settings = {"agent.app": APP, "agent.max_task_s": "120"}
    with server_thread(tmp_path_factory.mktemp("tasks") / "home", settings, start) as server:
        yield World(server, engine)


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Stubs]:
    world.engine.requests.clear()
    world.engine.aborted.clear()
    world.engine.gate = None
    async with world.server.stubs() as found:
        yield found


def says(world: World, *steps: str) -> None:
    """The model's steps in order; the last one is repeated."""

    def script(request: GenerateRequest) -> str:
        step = sum(message.role == "assistant" for message in request.prompt.messages)
        return steps[min(step, len(steps) - 1)]

    world.engine.script = script


def start(**fields: Any) -> agent_pb2.RunTaskRequest:
    user = content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text="do it")])
    fields.setdefault("messages", [user])
    return agent_pb2.RunTaskRequest(start=agent_pb2.TaskStart(**fields))


async def run(
    wire: Stubs, world: World, first: agent_pb2.RunTaskRequest, answer: content_pb2.ToolResult | None = None
) -> list[agent_pb2.RunTaskResponse]:
    """Every event of a task; tool requests are answered with `answer` under their id."""
    call = wire.agent.RunTask(metadata=world.server.user)
    await call.write(first)
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
        if event.HasField("tool_request") and answer is not None:
            result = content_pb2.ToolResult()
            result.CopyFrom(answer)
            result.call_id = result.call_id or event.tool_request.id
            await call.write(agent_pb2.RunTaskRequest(tool_result=result))
    await call.done_writing()
    return events


def kinds(events: list[agent_pb2.RunTaskResponse]) -> list[str]:
    """The kinds of events in order, runs of deltas as one."""
    found = [str(event.WhichOneof("event")) for event in events]
    return [kind for i, kind in enumerate(found) if kind != "delta" or i == 0 or found[i - 1] != "delta"]


async def test_the_applications_tools_run_and_the_task_ends_with_every_turn(wire: Stubs, world: World) -> None:
    says(world, ADD, FINAL)
    events = await run(wire, world, start())
    assert kinds(events) == ["started", "delta", "tool_call", "tool_result", "delta", "finished"]
    assert [event.tool_result.content for event in events if event.HasField("tool_result")] == ["5"]
    finished = events[-1].finished
    assert (finished.outcome, finished.answer, finished.num_steps) == (agent_pb2.TaskFinished.ANSWERED, FINAL, 2)
    assert [message.role for message in finished.messages] == [
        content_pb2.Message.ASSISTANT,
        content_pb2.Message.TOOL,
        content_pb2.Message.ASSISTANT,
    ]
    assert "".join(event.delta.text for event in events if event.HasField("delta")) == ADD + FINAL
    assert finished.usage.prompt_tokens == 14


async def test_the_applications_system_prompt_comes_first_unless_the_messages_bring_one(
    wire: Stubs, world: World
) -> None:
    says(world, FINAL)
    await run(wire, world, start())
    assert world.engine.requests[-1].prompt.messages[0].role == "system"
    assert world.engine.requests[-1].sampling.temperature == 0.0
    assert "add" in [tool.name for tool in world.engine.requests[-1].prompt.tools]
    own = [
        content_pb2.Message(role=content_pb2.Message.SYSTEM, parts=[content_pb2.Part(text="mine")]),
        content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text="do it")]),
    ]
    await run(wire, world, start(messages=own))
    assert [message.text for message in world.engine.requests[-1].prompt.messages] == ["mine", "do it"]


async def test_a_clients_tool_runs_at_the_client(wire: Stubs, world: World) -> None:
    says(world, ASK, ASK, FINAL)
    answer = content_pb2.ToolResult(name="ask_client", content="three")
    events = await run(wire, world, start(client_tools=[CLIENT_TOOL]), answer)
    requests = [event.tool_request for event in events if event.HasField("tool_request")]
    assert [request.name for request in requests] == ["ask_client", "ask_client"]
    assert json.loads(requests[0].arguments_json) == {"question": "how many?"}
    assert requests[0].id != requests[1].id, "a late answer to the first must not be taken for the second's"
    results = [event.tool_result for event in events if event.HasField("tool_result")]
    assert [(result.call_id, result.content) for result in results] == [(r.id, "three") for r in requests]
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.ANSWERED


async def test_a_tools_error_is_an_observation(wire: Stubs, world: World) -> None:
    says(world, write_call("fail_by_mistake", {}), ASK, write_call("no_such_tool", {}), FINAL)
    answer = content_pb2.ToolResult(name="ask_client", content="nobody here", is_error=True)
    events = await run(wire, world, start(client_tools=[CLIENT_TOOL]), answer)
    assert [e.tool_result.is_error for e in events if e.HasField("tool_result")] == [True, True, True]
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.ANSWERED
    row = world.server.runtime.store.query(
        "SELECT * FROM requests WHERE id = ?", (await logged(world, events[0].started.response_id),)
    )[0]
    assert (row["method"], row["num_steps"], row["num_tool_errors"], row["outcome"]) == ("task", 4, 3, "answered")


async def logged(world: World, response_id: str) -> str:
    """The id, once the log has written what came before."""
    await world.server.runtime.request_log.flush()
    return response_id


async def test_limits_end_a_task_with_an_outcome(wire: Stubs, world: World) -> None:
    says(world, ADD)
    events = await run(wire, world, start(max_steps=2))
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.MAX_STEPS
    assert events[-1].finished.num_steps == 2
    events = await run(wire, world, start(max_task_tokens=2))
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.MAX_TOKENS
    world.engine.gate = asyncio.Event()
    events = await run(wire, world, start(max_time_s=0.05))
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.MAX_TIME


async def test_a_client_that_does_not_answer_within_the_tasks_tool_time_is_an_observation(
    wire: Stubs, world: World
) -> None:
    says(world, ASK, FINAL)
    events = await run(wire, world, start(client_tools=[CLIENT_TOOL], max_tool_s=0.05))
    results = [event.tool_result for event in events if event.HasField("tool_result")]
    assert [result.content for result in results] == ["error: the client did not answer within 0.05 s"]
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.ANSWERED


@pytest.mark.parametrize(
    ("first", "field"),
    [
        (agent_pb2.RunTaskRequest(tool_result=content_pb2.ToolResult(name="x")), "start"),
        (agent_pb2.RunTaskRequest(), "start"),
        (start(max_steps=5000), "start.max_steps"),
        (start(max_steps=-1), "start.max_steps"),
        (start(max_task_tokens=10**6), "start.max_task_tokens"),
        (start(max_time_s=1e6), "start.max_time_s"),
        (start(max_time_s=math.nan), "start.max_time_s"),
        (start(max_tool_s=1e6), "start.max_tool_s"),
        (start(client_tools=[CLIENT_TOOL, CLIENT_TOOL]), "start.client_tools[1].name"),
        (start(client_tools=[content_pb2.Tool(name="add")]), "start.client_tools"),
        (start(sampling=content_pb2.Sampling(n=3)), "start.sampling.n"),
        (start(messages=[]), "start.messages"),
    ],
)
async def test_a_bad_start_names_its_field(
    wire: Stubs, world: World, first: agent_pb2.RunTaskRequest, field: str
) -> None:
    says(world, FINAL)
    found = await failure(run(wire, world, first))
    assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_result_that_nobody_asked_for_ends_the_task(wire: Stubs, world: World) -> None:
    says(world, ASK, FINAL)
    answer = content_pb2.ToolResult(call_id="call_77", name="ask_client", content="three")
    found = await failure(run(wire, world, start(client_tools=[CLIENT_TOOL]), answer))
    assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, "tool_result.call_id")


async def test_a_second_start_ends_the_task(wire: Stubs, world: World) -> None:
    says(world, ASK, FINAL)
    call = wire.agent.RunTask(metadata=world.server.user)
    await call.write(start(client_tools=[CLIENT_TOOL]))
    await call.write(start())

    async def read_on() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    assert (await failure(read_on())).field == "start"


async def test_a_client_that_hangs_up_leaves_its_tools_failing_not_waiting(wire: Stubs, world: World) -> None:
    says(world, ASK, FINAL)
    call = wire.agent.RunTask(metadata=world.server.user)
    await call.write(start(client_tools=[CLIENT_TOOL]))
    await call.done_writing()
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    assert next(e.tool_result for e in events if e.HasField("tool_result")).is_error
    assert events[-1].finished.outcome == agent_pb2.TaskFinished.ANSWERED


async def test_cancelling_stops_the_model_and_the_running_tool(wire: Stubs, world: World) -> None:
    says(world, ASK, FINAL)
    call = wire.agent.RunTask(metadata=world.server.user)
    await call.write(start(client_tools=[CLIENT_TOOL]))
    while not (await call.read()).HasField("tool_request"):
        pass
    call.cancel()
    counters = world.server.runtime.counters
    async with asyncio.timeout(60):
        while counters.num_in_flight["live"]:
            await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=world.server.admin)
    workspaces = world.server.home / "workspaces"
    assert not workspaces.exists() or not any(workspaces.iterdir())


async def test_a_repeated_task_is_not_run_again(wire: Stubs, world: World) -> None:
    says(world, ADD, FINAL)
    first = await run(wire, world, start(request_id="task-1"))
    num_requests = len(world.engine.requests)
    again = await run(wire, world, start(request_id="task-1"))
    assert len(world.engine.requests) == num_requests
    assert kinds(again) == ["started", "finished"]
    assert (again[0], again[-1]) == (first[0], first[-1])
    found = await failure(run(wire, world, start(request_id="task-1", max_steps=1)))
    assert found.reason == "ALREADY_EXISTS"


async def test_a_task_is_logged_with_who_wrote_each_turn(wire: Stubs, world: World) -> None:
    says(world, ADD, FINAL)
    events = await run(wire, world, start(request_id="task-2", session_id="s"))
    rows = world.server.runtime.store.query(
        "SELECT role, sampled FROM messages WHERE response_id = ? ORDER BY position",
        (events[0].started.response_id,),
    )
    assert [(row["role"], row["sampled"]) for row in rows] == [
        ("user", 0),
        ("assistant", 1),
        ("tool", 0),
        ("assistant", 1),
    ]
