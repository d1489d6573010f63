"""Strict tools from the SDK to the model and back: the shop's trained model, a real server, real tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import jsonschema
import pytest
from nightschool import Client, FinishReason, InvalidRequestError, Outcome, TaskResult, Tool, ToolCall, ToolCalled
from nightschool_server.app import is_correct, load_evaluation
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from examples.shop.app import app as shop
from examples.shop.toolbox import TOOLS
from tests.harness import Running, server_thread

TASKS = [task for task in load_evaluation(shop).tasks if not task.images][::24]
BOOKING = Tool(
    "book",
    "Books a table.",
    {
        "type": "object",
        "properties": {
            "day": {"enum": ["Montag", "Mittwoch"]},
            "guests": {"type": "integer", "minimum": 2, "maximum": 12},
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
        },
        "required": ["day", "guests", "name"],
    },
    strict=True,
)
UNGUIDABLE = Tool(
    "sort", "Sorts.", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, strict=True
)


def client_of(server: Running) -> Client:
    return Client(server.address, home=server.home, token=server.user[0][1].removeprefix("Bearer "))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server_thread(
        tmp_path_factory.mktemp("strict") / "home", {"agent.app": "tests.server.strict_app:app"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server_thread(tmp_path_factory.mktemp("plain") / "home", {"agent.app": "examples.shop.app:app"}) as running:
        yield running


@pytest.fixture
def client(strict: Running) -> Iterator[Client]:
    with client_of(strict) as found:
        yield found


def solve(server: Running) -> tuple[int, list[ToolCall]]:
    """How many tasks are answered rightly, and the calls that were made for them."""
    num_right, calls = 0, []
    with client_of(server) as client:
        for task in TASKS:
            events = list(client.run_task(task.prompt, temperature=0.0))
            calls += [event.call for event in events if isinstance(event, ToolCalled)]
            assert isinstance(events[-1], TaskResult)
            num_right += is_correct(task, events[-1].answer)
    return num_right, calls


def test_the_trained_model_does_its_tasks_with_strict_tools(strict: Running, plain: Running) -> None:
    num_right, calls = solve(strict)
    assert num_right >= solve(plain)[0] > 0
    schemas = {spec.name: spec.schema for spec in TOOLS}
    assert len(calls) >= len(TASKS)
    for call in calls:
        jsonschema.validate(call.arguments, {**schemas[call.name], "additionalProperties": False})


def test_a_required_call_of_a_strict_tool_fits_its_schema(client: Client) -> None:
    options = {"tools": [BOOKING], "tool_choice": "required", "max_tokens": 120}
    reply = client.generate("Book a table for six.", n=8, temperature=1.5, seed=1, **options)
    for answer in reply.answers:
        assert answer.tool_call_error == "" or answer.finish_reason is FinishReason.LENGTH
        assert {call.name for call in answer.tool_calls} == {"book"}
        for call in answer.tool_calls:
            jsonschema.validate(call.arguments, {**BOOKING.parameters, "additionalProperties": False})
    assert len({answer.text for answer in reply.answers}) == 8
    stream = client.stream("Book a table for six.", temperature=0.0, **options)
    assert "".join(stream) == client.generate("Book a table for six.", temperature=0.0, **options).text


def test_a_strict_tool_of_the_client_runs_in_a_task(client: Client) -> None:
    asked: list[str] = []

    def price_in_town(item: Literal["mug", "lamp"]) -> int:
        """The price of one item in town."""
        asked.append(item)
        return 12

    tool = Tool.of(price_in_town, strict=True)
    result = client.run_task("What does one mug cost in town?", tools=[tool], temperature=1.0, seed=5).result()
    assert result.outcome in tuple(Outcome)
    assert set(asked) <= {"mug", "lamp"}


def test_a_schema_that_cannot_be_guided_is_refused_by_its_field(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"strict tool 'sort' .*uniqueItems") as caught:
        client.generate("Sort.", tools=[BOOKING, UNGUIDABLE])
    assert caught.value.field == "tools[1].strict"
    with pytest.raises(InvalidRequestError, match="drop strict") as caught:
        client.run_task("Sort.", tools=[UNGUIDABLE]).result()
    assert caught.value.field == "start.client_tools[0].strict"
    with pytest.raises(InvalidRequestError, match="there are no tools"):
        client.generate("Sort.", tool_choice="required")
    assert client.generate("Sort.", tools=[replace(UNGUIDABLE, strict=False)], max_tokens=4).answers


def test_the_log_says_which_tools_were_strict(strict: Running, client: Client) -> None:
    reply = client.generate("Hi", tools=[BOOKING, replace(UNGUIDABLE, strict=False)], max_tokens=2, learning="train")
    client.feedback(reply.response_id, good=True)  # the log has been written when this returns
    store = Store.open(Home(strict.home), migrate=False)
    (row,) = store.query("SELECT tools FROM requests WHERE id = ?", (reply.response_id,))
    store.close()
    assert [(tool["name"], tool["strict"]) for tool in json.loads(row["tools"])] == [("book", True), ("sort", False)]
