"""How a model writes a tool call: the Hermes convention that Qwen follows.

    <tool_call>
    {"name": "price", "arguments": {"item": "mug"}}
    </tool_call>

Owns parsing and its inverse; other families' forms are `call_forms.py`. Checking arguments against a schema is the
agent runtime's. Whatever a model writes is bounded, never executed, and comes out as text that UTF-8, protobuf and
SQLite take.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from nightschool_server.chat import ToolCall

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

MAX_ANSWER_CHARS = 1_000_000
MAX_NAME_CHARS = 128
MAX_DEPTH = 64
"""Nesting of a call's JSON."""


@dataclass(frozen=True)
class ParsedAnswer:
    """An assistant's text taken apart."""

    text: str
    """What stands outside the tool calls, stripped."""
    calls: tuple[ToolCall, ...]
    """In their order; equal calls are kept, each with an id of its own."""
    error: str | None
    """Why the markup could not be read; then `calls` holds only those before the fault."""
    as_parts: bool = False
    """Whether the conversation keeps text and calls as parts, which the chat template writes, instead of the answer."""


def parse_answer(answer: str) -> ParsedAnswer:
    """Take text and tool calls out of an assistant's raw answer. Never raises."""
    if len(answer) > MAX_ANSWER_CHARS:
        return ParsedAnswer("", (), f"the answer has {len(answer)} characters; at most {MAX_ANSWER_CHARS} are read")
    outside: list[str] = []
    calls: list[ToolCall] = []
    error: str | None = None
    position = 0
    while error is None and (start := answer.find(OPEN, position)) >= 0:
        outside.append(answer[position:start])
        body = start + len(OPEN)
        try:
            call, position = _read_call(answer, body, f"call_{len(calls)}")
            calls.append(call)
        except ValueError as fault:
            error = str(fault) if answer.find(CLOSE, body) >= 0 else f"{OPEN} without {CLOSE}"
    if error is None:
        outside.append(answer[position:])
    text = "".join(outside).strip()
    if error is None and CLOSE in text:
        error = f"{CLOSE} without {OPEN}"
    return ParsedAnswer(text, tuple(calls), error)


def write_call(name: str, arguments: dict[str, Any]) -> str:
    """The call as the model would write it; `parse_answer` reads it back."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}\n{body}\n{CLOSE}"


def _read_call(answer: str, start: int, call_id: str) -> tuple[ToolCall, int]:
    """The call whose body begins at `start`, and where the text behind its end begins. Raises ValueError.

    The JSON says where it ends, so that an argument may hold the closing tag.
    """
    value, end = read_json(answer, start)
    end = _skip_space(answer, end)
    if not answer.startswith(CLOSE, end):
        raise ValueError(f"tool call goes on behind its JSON object: {CLOSE} must follow it")
    return checked_call(value, call_id), end + len(CLOSE)


def read_json(answer: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` or behind the space there, and where it ends. Raises ValueError."""
    start = _skip_space(answer, start)
    try:
        return _DECODER.raw_decode(answer, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"tool call is not JSON: {error.msg} at character {error.pos - start}") from error
    except RecursionError as error:
        raise ValueError("tool call is nested too deeply") from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def checked_call(value: Any, call_id: str) -> ToolCall:
    """`{"name", "arguments"}` from a model or from its code as a call. Raises ValueError with the rule."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('tool call must be an object with "name" and "arguments"')
    name, arguments = value["name"], value.get("arguments", {})
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise ValueError(f'"name" of a tool call must have 1 to {MAX_NAME_CHARS} characters')
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" of a tool call must be an object')
    _check_depth(arguments)
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{written}".encode()
    except UnicodeEncodeError as error:
        raise ValueError("tool call holds half a surrogate pair, which is not Unicode text") from error
    except ValueError as error:
        raise ValueError("tool call holds a number that is too large") from error
    return ToolCall(call_id, name, written)


def _check_depth(value: Any) -> None:
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"tool call is nested more than {MAX_DEPTH} levels deep")
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        pending.extend((child, depth + 1) for child in children)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("tool call names a key twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"tool call holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
