"""How a model writes a tool call: the Hermes convention that Qwen follows.

    <tool_call>
    {"name": "price", "arguments": {"item": "mug"}}
    </tool_call>

Owns parsing and its inverse. Checking arguments against a schema is the agent runtime's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import ToolCall

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True)
class ParsedAnswer:
    """An assistant's text taken apart."""

    text: str
    """What stands outside the tool calls, stripped."""
    calls: tuple[ToolCall, ...]
    error: str | None
    """Why the markup could not be read; then `calls` holds only those before the fault."""


def parse_answer(answer: str) -> ParsedAnswer:
    """Take text and tool calls out of an assistant's raw answer. Never raises."""
    outside: list[str] = []
    calls: list[ToolCall] = []
    rest = answer
    while OPEN in rest:
        before, _, after = rest.partition(OPEN)
        outside.append(before)
        body, closed, rest = after.partition(CLOSE)
        if not closed:
            return ParsedAnswer(_join(outside), tuple(calls), f"{OPEN} without {CLOSE}")
        try:
            calls.append(_parse_call(body, f"call_{len(calls)}"))
        except ValueError as error:
            return ParsedAnswer(_join(outside), tuple(calls), str(error))
    outside.append(rest)
    return ParsedAnswer(_join(outside), tuple(calls), None)


def write_call(name: str, arguments: dict[str, Any]) -> str:
    """The call as the model would write it; `parse_answer` reads it back."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}\n{body}\n{CLOSE}"


def _join(outside: list[str]) -> str:
    return "".join(outside).strip()


def _parse_call(body: str, call_id: str) -> ToolCall:
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise ValueError(f"tool call is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('tool call must be an object with "name" and "arguments"')
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" of a tool call must be an object')
    return ToolCall(call_id, value["name"], json.dumps(arguments, ensure_ascii=False))
