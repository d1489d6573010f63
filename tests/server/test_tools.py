"""What `@tool` makes of a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from nightschool_server.agent.arguments import arguments_fault, schema_fault
from nightschool_server.chat import ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.tools.effects import Effect, conduct_of
from nightschool_server.tools.tool import Tool, ToolContext, tool


@dataclass
class Address:
    street: str
    number: int = 1


class Line(TypedDict):
    item: str
    quantity: NotRequired[int]


@tool(effect="workspace", timeout_s=5)
def order(
    context: ToolContext,
    *,
    item: str,
    lines: list[Line],
    to: Address,
    price: float,
    colour: Literal["red", "blue"] = "red",
    note: str | None = None,
    labels: dict[str, int] | None = None,
) -> str:
    """Order an item.

    More that the model does not need.

    Args:
        item: What to order,
            in one word.
        colour (str): Which one.

    Returns:
        a text: not an argument.
    """
    return f"{item} {lines} {to} {price} {colour} {note} {labels}"


def context() -> ToolContext:
    return ToolContext({}, Path())


def test_the_schema_comes_from_hints_defaults_and_docstring() -> None:
    assert (order.spec.name, order.spec.description) == ("order", "Order an item.")
    assert (order.effect, order.timeout_s) == ("workspace", 5)
    assert order.spec.schema == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "What to order, in one word."},
            "lines": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"item": {"type": "string"}, "quantity": {"type": "integer"}},
                    "required": ["item"],
                    "additionalProperties": False,
                },
            },
            "to": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "number": {"type": "integer"}},
                "required": ["street"],
                "additionalProperties": False,
            },
            "price": {"type": "number"},
            "colour": {"type": "string", "enum": ["red", "blue"], "default": "red", "description": "Which one."},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "labels": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "null"}],
                "default": None,
            },
        },
        "required": ["item", "lines", "price", "to"],
    }
    assert schema_fault(order.spec.parameters) is None


def test_a_tool_without_arguments_has_an_empty_object() -> None:
    @tool(effect="read_only")
    def ping() -> str:
        """Answer."""
        return "pong"

    assert ping.spec.parameters == '{"properties":{},"required":[],"type":"object"}'
    assert ping() == "pong"


def test_json_arguments_become_what_the_hints_ask_for() -> None:
    arguments = {"item": "mug", "lines": [{"item": "a"}], "to": {"street": "High", "number": 2.0}, "price": 3}
    assert arguments_fault(order.spec.parameters, arguments, closed=True) is None
    given = context()
    bound = order.prepare(arguments, given).keywords
    assert bound["context"] is given
    assert bound["to"] == Address("High", 2)
    assert isinstance(bound["to"].number, int)
    assert isinstance(bound["price"], float)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int | float, 2, 2),
        (int | float, 2.5, 2.5),
        (int | None, 2.0, 2),
        (int | None, None, None),
        (Sequence[int], [1.0], [1]),
        (tuple[float, ...], [1], (1.0,)),
        (dict[str, int], {"a": 1.0}, {"a": 1}),
        (bool, True, True),
        (Any, {"a": 1}, {"a": 1}),
    ],
)
def test_values_are_converted(hint: Any, value: Any, expected: Any) -> None:
    def takes(value: Any) -> None:
        """Take a value."""

    takes.__annotations__["value"] = hint
    bound = tool(takes).prepare({"value": value}, context()).keywords["value"]
    assert bound == expected
    assert type(bound) is type(expected)


def test_an_undeclared_effect_is_the_one_that_practice_never_runs() -> None:
    @tool
    def send(to: str) -> str:
        """Send."""
        return to

    assert send.effect == "external"
    assert conduct_of(send.effect, "practice", can_simulate=False) == "refuse"


def test_practice_runs_what_stays_in_the_task_simulates_what_it_can_and_refuses_the_rest() -> None:
    effects: tuple[Effect, ...] = ("read_only", "workspace", "external")
    assert [conduct_of(effect, "live", can_simulate=True) for effect in effects] == ["run", "run", "run"]
    assert [conduct_of(effect, "practice", can_simulate=True) for effect in effects] == ["run", "run", "simulate"]
    assert [conduct_of(effect, "practice", can_simulate=False) for effect in effects] == ["run", "run", "refuse"]


def send_mail(to: str, subject: str = "") -> str:
    """Send a mail."""
    raise AssertionError("it must never be sent in a test")


def mail(*, to: str, context: ToolContext, subject: str = "") -> str:
    """A simulator may keep what it would have done in the task's state."""
    context.state["to"] = to
    return f"sent to {to}"


def test_a_simulator_answers_in_the_place_of_an_external_tool() -> None:
    made = tool(simulate=mail)(send_mail)
    kept = context()
    assert made.prepare({"to": "ann"}, kept, simulate=True)() == "sent to ann"
    assert kept.state == {"to": "ann"}


def no_subject(to: str) -> str:
    return to


def more(to: str, cc: str, subject: str = "") -> str:
    return to


def other_type(to: int, subject: str = "") -> int:
    return to


def other_default(to: str, subject: str = "hello") -> str:
    return to


def by_place(to: str, /, subject: str = "") -> str:
    return to


@pytest.mark.parametrize(
    ("simulator", "effect", "fault"),
    [
        (no_subject, "external", "the simulator of tool 'send_mail' does not take 'subject'"),
        (more, "external", "takes 'cc', which the tool"),
        (other_type, "external", "declares 'to' as int, the tool .* as str: use the same type and default"),
        (other_default, "external", "declares 'subject' as str = 'hello', the tool .* as str = ''"),
        (by_place, "external", "parameter 'to' must be one that can be given by name"),
        (tool(mail), "external", "is itself a tool: give a plain function"),
        (mail, "workspace", "is declared workspace and has a simulator"),
    ],
)
def test_a_simulator_that_does_not_fit_is_refused(simulator: Callable[..., Any], effect: Effect, fault: str) -> None:
    with pytest.raises(AppError, match=fault) as raised:
        tool(effect=effect, simulate=simulator)(send_mail)
    assert f"{Path(__file__).name}:" in str(raised.value), "the message says where"


def no_docstring(a: int) -> int:
    return a


def no_hint(a) -> int:  # type: ignore[no-untyped-def]
    """Take what it gets."""
    return 1


def no_schema(a: Callable[[], int]) -> int:
    """Take a function."""
    return a()


def bytes_keys(a: dict[int, str]) -> None:
    """Take numbers for keys."""


def any_number(*a: int) -> None:
    """Take any number."""


def odd_default(a: float = float("nan")) -> None:
    """Take a default that is not JSON."""


def undescribed(a: int) -> None:
    """Describe what is not there.

    Args:
        b: Not there.
    """


def unknown_hint(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Take what nobody knows."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "has no docstring"),
        (no_hint, "parameter 'a' has no type hint"),
        (no_schema, "has no JSON Schema"),
        (bytes_keys, "keys of a JSON object are strings"),
        (any_number, "must be one that can be given by name"),
        (odd_default, "default of 'a' is not a JSON value"),
        (undescribed, "describes 'b', which is not a parameter"),
        (unknown_hint, "a type hint cannot be read"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_with_its_place(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(AppError, match=message) as raised:
        tool(function)
    assert f"{__file__}:{function.__code__.co_firstlineno}" in str(raised.value)


def test_a_wrong_declaration_is_refused() -> None:
    with pytest.raises(AppError, match="must be one of external, read_only, workspace"):
        tool(effect="readonly")(order.function)  # type: ignore[call-overload]
    with pytest.raises(AppError, match="timeout_s is 0"):
        tool(timeout_s=0)(order.function)
    with pytest.raises(AppError, match="must match"):
        Tool(ToolSpec("two words", "", "{}"), order.function)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ('{"type": "string"}', "must be an object schema"),
        ('{"type": "object", "properties": {"a": {"type": "strin"}}}', "$.properties.a.type"),
        ('{"type": "object", "required": "a"}', "$.required"),
        ('{"type": "object", "properties": {"a": {"$ref": "https://example.com/s"}}}', "points outside the schema"),
        ('{"type": "object", "patternProperties": {"(a+)+$": {}}}', "patternProperties is not supported"),
        (json.dumps({"type": "object", "description": "x" * 70_000}), "at most 65536"),
        ('{"type": "object", "not": ' + '{"not": ' * 50 + "{}" + "}" * 51, "levels deep"),
    ],
)
def test_a_wrong_schema_is_named(schema: str, fault: str) -> None:
    assert fault in (schema_fault(schema) or "")


@pytest.mark.parametrize(
    ("properties", "arguments", "fault"),
    [
        ({"a": {"type": "integer"}}, {"a": "two"}, "argument 'a': 'two' is not of type 'integer'"),
        ({"a": {"type": "integer"}}, {"a": True}, "argument 'a': True is not of type 'integer'"),
        ({"a": {"enum": ["x"]}}, {"a": "y"}, "argument 'a': 'y' is not one of ['x']"),
        ({"a": {"items": {"type": "string"}}}, {"a": ["x", 1]}, "argument 'a[1]': 1 is not of type 'string'"),
        ({"a": {}}, {}, "'a' is a required property"),
        ({"a": {}}, {"a": 1, "b": 1}, "('b' was unexpected)"),
        ({"a": {"$ref": "#"}}, {"a": 1}, "1 is not of type 'object'"),
        ({"a": {"$ref": "#/nowhere"}}, {"a": 1}, "the tool's schema cannot be applied"),
        ({"a": {"allOf": [{"$ref": "#/properties/a"}]}}, {"a": 1}, "the tool's schema cannot be applied"),
        ({"a": {"maxLength": 3}}, {"a": "x" * 1000}, "…"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(properties: Any, arguments: Any, fault: str) -> None:
    schema = json.dumps({"type": "object", "properties": properties, "required": ["a"]})
    found = arguments_fault(schema, arguments, closed=True)
    assert found is not None
    assert fault in found
    assert len(found) <= 301


def test_a_regular_expression_in_a_schema_is_not_run() -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}}'
    assert schema_fault(schema) is None
    assert arguments_fault(schema, {"a": "a" * 40 + "!"}) is None
