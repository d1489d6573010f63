"""Guided answers: what may be sampled where a tool is strict or a call is required, one grammar for every engine.

    free text <tool_call>
    {"name": "price", "arguments": {"item": "mug"}}
    </tool_call> free text

Free text stays free; from `<tool_call>` on, whether that is a token of its own or spelled out, an answer is held to a
call of one of the offered tools. A strict tool's arguments follow its JSON Schema, properties in the schema's order;
any other tool's are a JSON object. A call has one form, that of chat templates and `agent.toolcalls.write_call`: one
space behind a separator and no other white space. Text holds no special token but those that end an answer.

Owns the grammar's text, in llguidance's dialect of Lark, and what is wrong with a schema that it cannot express. Light:
an application's schemas are checked without a model. Compiling for a tokenizer and masks are `matching.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llguidance

from nightschool_server.agent.toolcalls import CLOSE, OPEN
from nightschool_server.chat import ToolSpec
from nightschool_server.engine import Prompt
from nightschool_server.errors import InvalidRequestError

_FORM = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""llguidance's options of a schema, `x-guidance`."""

_ELSEWHERE = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "patternProperties"})
"""Keywords that may name properties which `properties` does not."""

MAX_ITEMS = 1000
"""Of `minItems` and `maxItems`: what a grammar of 100,000 items takes to compile is seconds."""

LIMITS = llguidance.LLParserLimits(max_grammar_size=20_000)
"""Symbols of a grammar: the shop's five tools have about 100, 128 tools of six arguments 10,000, in 25 ms."""

_MAX_FAULT_CHARS = 300


@dataclass(frozen=True)
class Marks:
    """The tokens of a tokenizer that a grammar names by id, because no text stands for them there."""

    open_id: int | None = None
    """`<tool_call>`"""
    close_id: int | None = None
    """`</tool_call>`"""
    text_ids: tuple[int, ...] = ()
    """Other added tokens that are part of an answer's text, such as `<think>`."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer, the tokenizer's own end token not among them: it always may."""


def is_guided(prompt: Prompt) -> bool:
    """Whether answers to a prompt are guided."""
    return prompt.tool_choice == "required" or any(tool.strict for tool in prompt.tools)


def check_tools(prompt: Prompt) -> None:
    """Raise InvalidRequestError where a strict tool's schema cannot be guided, or a call is required of no tool."""
    if prompt.tool_choice == "required" and not prompt.tools:
        raise InvalidRequestError("tool_choice", "tool_choice is REQUIRED, but there are no tools: send some, or AUTO")
    for tool in prompt.tools:
        if fault := strict_fault(tool):
            raise InvalidRequestError("tools", fault)


@lru_cache(maxsize=1024)
def strict_fault(tool: ToolSpec) -> str | None:
    """Why a strict tool's schema cannot be guided, with the remedy, or None. Takes 1 to 20 ms, the GIL released."""
    if not tool.strict:
        return None
    why = _too_many_items(tool.schema)
    if why is None:
        text = f"start: {_json(_strict_schema(tool))}"
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
        if not is_error:
            return None
        why = reason(messages[0])
    return f"the schema of strict tool {tool.name!r} cannot be guided ({why}): simplify it, or drop strict"


def reason(message: str) -> str:
    """The point of one of llguidance's messages, without the grammar that it quotes."""
    first = message.strip().partition("\n")[0]
    return first.rpartition("failed to compile JSON schema: ")[2][:_MAX_FAULT_CHARS]


def grammar(tools: Sequence[ToolSpec], *, required: bool, marks: Marks) -> str:
    """The grammar of an answer; its rules are explained at the top. There is at least one tool."""
    text_token = _ids(marks.text_ids)
    opened = _either(OPEN, marks.open_id)
    if required:
        answer = ['start: call ("\\n" call)* end', f"call: {opened} body"]
    else:
        ways = ["lead head", *([f"lead TEXT {_ids((marks.open_id,))}"] if marks.open_id is not None else [])]
        answer = [
            "start: call* lead TEXT end",
            f"call: ({' | '.join(ways)}) body",
            f"lead: (TEXT {text_token})*" if text_token else 'lead: ""',
            # Lazy: the text ends with the first mark in it.
            f"head[lazy]: TEXT {json.dumps(OPEN)}",
            "TEXT: /(.|\\n)*/",
        ]
    calls = [f"call_{index}: {_call(tool)}" for index, tool in enumerate(tools)]
    some_call = " | ".join(f"call_{index}" for index in range(len(tools)))
    return "\n".join(
        (
            "%llguidance {}",
            *answer,
            f'body: "\\n" ({some_call}) "\\n" {_either(CLOSE, marks.close_id)}',
            f"end: {_ids(marks.end_ids)}?" if marks.end_ids else 'end: ""',
            *calls,
        )
    )


def _too_many_items(schema: Any) -> str | None:
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for keyword in ("minItems", "maxItems"):
                number = value.get(keyword)
                if isinstance(number, int) and number > MAX_ITEMS:
                    return f"{keyword} is {number}; at most {MAX_ITEMS} can be"
        pending.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return None


def _call(tool: ToolSpec) -> str:
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
    schema = _strict_schema(tool) if tool.strict else {"type": "object", "x-guidance": _FORM}
    return f'{json.dumps(head, ensure_ascii=False)} {_json(schema)} "}}"'


def _strict_schema(tool: ToolSpec) -> dict[str, Any]:
    """The tool's schema; arguments that it does not name are left out where it does not say itself."""
    schema: dict[str, Any] = {**tool.schema, "x-guidance": _FORM}
    if "properties" in schema and not _ELSEWHERE & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema)}"


def _either(text: str, token_id: int | None) -> str:
    return json.dumps(text) if token_id is None else f"({json.dumps(text)} | {_ids((token_id,))})"


def _ids(token_ids: Sequence[int]) -> str:
    return f"<[{','.join(map(str, token_ids))}]>" if token_ids else ""
