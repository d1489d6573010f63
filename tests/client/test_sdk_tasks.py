"""run_task: events, the client's own tools, and what they become on the wire."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import pytest
from nightschool import (
    AsyncClient,
    Client,
    Delta,
    InternalError,
    NotFoundError,
    Outcome,
    Started,
    StreamClosedError,
    TaskResult,
    Tool,
    ToolCall,
    ToolCalled,
    ToolError,
    ToolResult,
    ToolReturned,
)
from nightschool_proto.v1 import agent_pb2, content_pb2

from tests.client.fake_replies import task_script
from tests.client.fake_server import WAIT_S, FakeServer, failing


def stock(item: str, shelf: int = 1) -> dict[str, int]:
    """How many are left.

    Args:
        item: Name of the thing,
            in the singular.
        shelf: Which shelf.
    """
    return {item: shelf * 2}


def broken(item: str) -> str:
    """Fails."""
    raise LookupError(f"no {item}")


async def slow_stock(item: str) -> str:
    """How many are left, said later."""
    await asyncio.sleep(0)
    return f"7 of {item}"


def call_of(name: str, **arguments: Any) -> content_pb2.ToolCall:
    return content_pb2.ToolCall(id=f"call_{name}", name=name, arguments_json=json.dumps(arguments))


def test_a_task_ends_in_a_result(client: Client) -> None:
    result = client.run_task("hello").result()
    assert (result.answer, result.outcome, result.num_steps) == ("echo hello", Outcome.ANSWERED, 1)
    assert (result.response_id, result.adapter) == ("resp_t", "3-abcdef01")
    assert result.messages[0].text == "echo hello"


def test_events_come_in_order_and_the_result_is_the_last(client: Client, server: FakeServer) -> None:
    server.script["RunTask"].append(task_script(call_of("stock", item="mug", shelf=2), server=server))
    run = client.run_task("count", tools=[stock])
    events = list(run)
    assert [type(event) for event in events] == [Started, Delta, ToolCalled, ToolReturned, TaskResult]
    assert events[2] == ToolCalled(ToolCall("call_stock", "stock", '{"item": "mug", "shelf": 2}'))
    assert events[3] == ToolReturned(ToolResult("call_stock", "stock", '{"mug": 4}'))
    assert run.result() is events[-1]
    assert [result.content for result in server.tool_results] == ['{"mug": 4}']


def test_options_reach_the_start(client: Client, server: FakeServer) -> None:
    seen: list[agent_pb2.TaskStart] = []

    def look(requests: Iterator[agent_pb2.RunTaskRequest], context: grpc.ServicerContext) -> Iterator[Any]:
        seen.append(next(requests).start)
        yield from task_script()(iter([agent_pb2.RunTaskRequest(start=seen[0])]), context)

    server.script["RunTask"].append(look)
    client.run_task("hello", tools=[stock], max_steps=3, max_tokens=9, adapter="base", images=[b"raw"]).result()
    (start,) = seen
    assert (start.max_steps, start.sampling.max_tokens, start.adapter) == (3, 9, "base")
    assert start.request_id.startswith("req_")
    assert start.messages[0].parts[0].image.data == b"raw"
    assert [tool.name for tool in start.client_tools] == ["stock"]


def test_an_exception_of_a_tool_is_an_observation(client: Client, server: FakeServer) -> None:
    server.script["RunTask"].append(task_script(call_of("broken", item="mug"), server=server))
    assert client.run_task("count", tools=[broken]).result().answer == "LookupError: no mug"
    assert server.tool_results[0].is_error


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (call_of("unknown"), "no tool 'unknown'"),
        (call_of("stock"), "TypeError"),
        (content_pb2.ToolCall(id="c", name="stock", arguments_json="{oops"), "JSONDecodeError"),
        (content_pb2.ToolCall(id="c", name="stock", arguments_json="[1]"), "not a JSON object"),
    ],
)
def test_a_call_that_cannot_be_run_is_an_observation_too(
    client: Client, server: FakeServer, call: content_pb2.ToolCall, problem: str
) -> None:
    server.script["RunTask"].append(task_script(call, server=server))
    client.run_task("count", tools=[stock]).result()
    assert server.tool_results[0].is_error
    assert problem in server.tool_results[0].content


async def test_async_and_plain_tools_run_at_the_async_client(aclient: AsyncClient, server: FakeServer) -> None:
    calls = [call_of("slow_stock", item="mug"), call_of("stock", item="jug"), call_of("broken", item="cup")]
    server.script["RunTask"].append(task_script(*calls, server=server))
    result = await aclient.run_task("count", tools=[slow_stock, stock, broken]).result()
    assert result.answer == '7 of mug, {"jug": 2}, LookupError: no cup'


def test_the_blocking_client_says_that_it_runs_no_async_tools(client: Client, server: FakeServer) -> None:
    server.script["RunTask"].append(task_script(call_of("slow_stock", item="mug"), server=server))
    client.run_task("count", tools=[slow_stock]).result()
    assert "AsyncClient" in server.tool_results[0].content


async def test_both_clients_see_the_same_events(client: Client, aclient: AsyncClient, server: FakeServer) -> None:
    server.script["RunTask"].extend([task_script(call_of("stock", item="mug"))] * 2)
    awaited = [event async for event in aclient.run_task("count", tools=[stock])]
    assert awaited == list(client.run_task("count", tools=[stock]))


def test_leaving_a_task_cancels_it(client: Client, server: FakeServer) -> None:
    def endless(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[agent_pb2.RunTaskResponse]:
        ended = threading.Event()
        context.add_callback(ended.set)
        yield agent_pb2.RunTaskResponse(started=agent_pb2.Started(response_id="resp_t"))
        ended.wait(WAIT_S)

    server.script["RunTask"].append(endless)
    run = client.run_task("count")
    for event in run:
        assert isinstance(event, Started)
        break
    assert server.calls[0].ended.wait(WAIT_S)
    with pytest.raises(StreamClosedError):
        run.result()


def test_an_error_of_the_server_is_raised(client: Client, server: FakeServer) -> None:
    server.script["RunTask"].append(failing(grpc.StatusCode.NOT_FOUND, "no such adapter"))
    with pytest.raises(NotFoundError, match="no such adapter"):
        client.run_task("count").result()


def test_a_task_without_a_result_is_the_server_s_fault(client: Client, server: FakeServer) -> None:
    started = agent_pb2.RunTaskResponse(started=agent_pb2.Started(response_id="resp_t"))
    server.script["RunTask"].append(lambda requests, context: iter([started]))
    with pytest.raises(InternalError, match="without a result"):
        client.run_task("count").result()


def test_a_signature_becomes_a_json_schema() -> None:
    tool = Tool.of(stock)
    assert (tool.name, tool.description) == ("stock", "How many are left.")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "Name of the thing, in the singular."},
            "shelf": {"type": "integer", "description": "Which shelf.", "default": 1},
        },
        "required": ["item"],
    }


def test_hints_become_their_schemas() -> None:
    def tool(*, a: list[int], b: dict[str, float], c: Literal["x", "y"], d: str | None, e: Any, f: bool) -> None:
        """Does nothing."""

    assert Tool.of(tool).parameters["properties"] == {
        "a": {"type": "array", "items": {"type": "integer"}},
        "b": {"type": "object", "additionalProperties": {"type": "number"}},
        "c": {"enum": ["x", "y"], "type": "string"},
        "d": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "e": {},
        "f": {"type": "boolean"},
    }


def test_a_function_that_is_no_tool_is_refused_with_the_reason(client: Client) -> None:
    def undocumented(x: int) -> None: ...

    def unhinted(x) -> None:  # type: ignore[no-untyped-def]
        """Does nothing."""

    def exotic(x: bytes) -> None:
        """Does nothing."""

    def splat(*x: int) -> None:
        """Does nothing."""

    refused: list[tuple[Any, str]] = [
        ({"name": "f"}, r"tools\[0\] is \{'name': 'f'\}, but must be a function"),
        (undocumented, "has no docstring"),
        (unhinted, "'x' of tool 'unhinted' has no type hint"),
        (exotic, "'x' of tool 'exotic'.*no JSON Schema"),
        (splat, "given by name"),
    ]
    for function, problem in refused:
        with pytest.raises(ToolError, match=problem):
            client.run_task("count", tools=[function])
