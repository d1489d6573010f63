"""Tools with schemas of every kind that guidance has to hold, and what their calls must look like."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from nightschool_server.agent.toolcalls import parse_answer
from nightschool_server.chat import ToolCall, ToolSpec, canonical_json, user
from nightschool_server.engine import Prompt, ToolChoice


def spec(name: str, properties: dict[str, Any], *, strict: bool = True, **schema: Any) -> ToolSpec:
    """A tool whose arguments are all required."""
    whole = {"type": "object", "properties": properties, "required": sorted(properties), **schema}
    return ToolSpec(name, f"Does {name}.", canonical_json(whole), strict)


ORDER = spec(
    "order",
    {
        "colour": {"enum": ["red", "grün", "blau"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 17},
        "gift": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 6},
        "place": {
            "type": "object",
            "properties": {
                "floor": {"anyOf": [{"type": "integer", "minimum": -1, "maximum": 9}, {"type": "null"}]},
                "shelf": {"const": "日本"},
            },
            "required": ["floor", "shelf"],
            "additionalProperties": False,
        },
        "sizes": {"type": "array", "items": {"enum": ["S", "M"]}, "minItems": 1, "maxItems": 2},
    },
)
PRICE = spec("price", {"item": {"enum": ["mug", "lamp"]}})
ASK = spec("ask", {"yes": {"type": "boolean"}}, strict=False)
UNGUIDABLE = spec("sort", {"items": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}})


def prompt_of(*tools: ToolSpec, text: str = "How many?", tool_choice: ToolChoice = "required") -> Prompt:
    """A question with tools."""
    return Prompt((user(text),), tools, tool_choice=tool_choice)


def checked_calls(text: str, finish_reason: str | None, *tools: ToolSpec) -> tuple[ToolCall, ...]:
    """The calls of an answer; fails where one breaks its tool's schema, or the answer ended and cannot be read."""
    parsed = parse_answer(text)
    assert parsed.error is None or finish_reason == "length", (parsed.error, text)
    by_name = {tool.name: tool for tool in tools}
    for call in parsed.calls:
        tool = by_name[call.name]
        if tool.strict:
            jsonschema.validate(json.loads(call.arguments), {"additionalProperties": False, **tool.schema})
    return parsed.calls
