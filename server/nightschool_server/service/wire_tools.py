"""Tools off the wire: their names, their schemas, and what may be guided.

Checking a schema takes milliseconds and callers repeat their tools, so each is checked once. Every violation is an
InvalidRequestError that names the field's path.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonschema
from nightschool_proto.v1 import content_pb2

from nightschool_server import chat
from nightschool_server.engine import ToolChoice
from nightschool_server.engines.guidance import strict_fault
from nightschool_server.errors import InvalidRequestError

MAX_SCHEMA_CHARS = 65_536
MAX_TOOLS = 128

TOOL_CHOICES: dict[int, ToolChoice] = {
    content_pb2.TOOL_CHOICE_UNSPECIFIED: "auto",
    content_pb2.AUTO: "auto",
    content_pb2.REQUIRED: "required",
}


def tools_of(tools: Sequence[content_pb2.Tool], field: str) -> tuple[chat.ToolSpec, ...]:
    """The tools, each with a name of its own and a JSON Schema of type object that can be guided where it is strict."""
    if len(tools) > MAX_TOOLS:
        _refuse(field, f"{len(tools)} tools, but at most {MAX_TOOLS} are taken: send those that the task needs")
    seen: dict[str, int] = {}
    for index, tool in enumerate(tools):
        if not tool.name.strip():
            _refuse(f"{field}[{index}].name", "empty: a tool needs a name that the model can write")
        if tool.name in seen:
            first = f"{field}[{seen[tool.name]}]"
            _refuse(f"{field}[{index}].name", f"{tool.name!r}, which {first} has already: give each tool its own name")
        seen[tool.name] = index
    return tuple(_tool(tool, f"{field}[{index}]") for index, tool in enumerate(tools))


def tool_choice_of(value: int, tools: Sequence[content_pb2.Tool]) -> ToolChoice:
    """Whether a call is required."""
    if value not in TOOL_CHOICES:
        _refuse("tool_choice", f"{value}, which is none of AUTO and REQUIRED")
    choice = TOOL_CHOICES[value]
    if choice == "required" and not tools:
        _refuse("tool_choice", "REQUIRED, but there are no tools: send some, or AUTO")
    return choice


def json_of(text: str) -> Any:
    """JSON without the NaN and Infinity that Python's reader takes. Raises ValueError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _tool(tool: content_pb2.Tool, field: str) -> chat.ToolSpec:
    schema = _schema(tool.parameters_json, f"{field}.parameters_json")
    spec = chat.ToolSpec(tool.name, tool.description, schema, tool.strict)
    if fault := strict_fault(spec):
        _refuse(f"{field}.strict", f"true, but {fault}")
    return spec


def _schema(text: str, field: str) -> str:
    """The canonical text of a tool's JSON Schema; empty means no arguments."""
    if len(text) > MAX_SCHEMA_CHARS:
        _refuse(field, f"{len(text)} characters long, but a schema may have at most {MAX_SCHEMA_CHARS}: shorten it")
    try:
        return _checked_schema(text)
    except ValueError as error:
        _refuse(field, str(error))


@functools.lru_cache(maxsize=1024)
def _checked_schema(text: str) -> str:
    if not text:
        return chat.canonical_json({"type": "object", "properties": {}})
    shown = text if len(text) <= 80 else text[:80] + "..."
    try:
        schema = json_of(text)
    except ValueError as error:
        raise ValueError(f"{shown!r}, which is not JSON ({error}): send a JSON Schema of type object") from None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ValueError(f'{shown!r}, but a tool\'s schema must be an object with "type": "object"')
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(str(step) for step in error.absolute_path) or "its root"
        raise ValueError(f"not a JSON Schema: at {where}: {error.message[:200]}") from None
    return chat.canonical_json(schema)


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequestError(field, f"{field} is {problem}")
