"""How model families write tool calls: one `CallForm` for each, read into the same bounded `ParsedAnswer`.

    hermes       <tool_call>{"name": "price", "arguments": {"item": "mug"}}</tool_call>    Qwen 2 to 3, Hermes
    llama3_json  {"name": "price", "parameters": {"item": "mug"}}                          Llama 3.1 and later
    mistral      [TOOL_CALLS]price[ARGS]{"item": "mug"}, or a list as before               Mistral
    pythonic     [price(item="mug")]                                                       Llama 3.2 and 4, OLMo 3
    qwen3_coder  <tool_call><function=price><parameter=item>mug</parameter>...             Qwen 3 Coder and 3.5

Owns which form a chat template asks for. The JSON forms are read by `toolcalls.py`'s own reader: it knows where a JSON
value ends, and says what is wrong with one, where the engines' libraries cut at marks and take what they cannot read
for the answer. The form in XML is transformers' (`chat_parsing`), which casts its values by the tools' schemas.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.agent.toolcalls import (
    CLOSE,
    MAX_ANSWER_CHARS,
    OPEN,
    ParsedAnswer,
    checked_call,
    parse_answer,
    read_json,
    write_call,
)
from nightschool_server.chat import ToolCall, ToolSpec, template_tools

Read = Callable[[str, Sequence[ToolSpec]], ParsedAnswer]
"""Takes text and calls out of an answer, for these tools. Never raises."""

MAX_LIBRARY_CHARS = 65_536
"""Of an answer whose reader is not linear in it; far beyond what a step may have."""

CHAT_PARSING = "transformers.utils.chat_parsing"

_LLAMA_MARK, _MISTRAL_MARK = "<|python_tag|>", "[TOOL_CALLS]"
_LLAMA_CALL = re.compile(r'\s*\{\s*"(name|parameters|type|function)"')
_MISTRAL_NAME = re.compile(r"\s*(?P<name>[\w.-]{1,128})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHONIC_CALL = re.compile(r"\s*\[\s*[A-Za-z_][\w.-]*\(")


@dataclass(frozen=True)
class CallForm:
    """One family's way of writing calls."""

    name: str
    """As the configuration calls it."""
    hint: str
    """How to write a call, said behind what is wrong with one."""
    read: Read
    write: Callable[[str, dict[str, Any]], str]
    """A call as the model would write it, from its name and arguments."""
    special_tokens: bool = False
    """Whether its marks are special tokens of the model, which the engine must leave in an answer's text."""
    needs: str = ""
    """The library's module that reads it, where that is not the runtime's own reader."""
    can_be_guided: bool = False
    """Whether answers can be held to a tool's schema; see `engines/guidance.py`."""


def _bounded(read: Callable[[str, Sequence[ToolSpec]], ParsedAnswer], limit: int = MAX_ANSWER_CHARS) -> Read:
    """`read`, whose ValueErrors are what is wrong with the answer, for answers that are not too long."""

    def bounded(answer: str, tools: Sequence[ToolSpec] = ()) -> ParsedAnswer:
        if len(answer) > limit:
            return ParsedAnswer("", (), f"the answer has {len(answer)} characters; at most {limit} are read")
        try:
            return read(answer, tools)
        except ValueError as error:
            return ParsedAnswer(answer.strip(), (), str(error), as_parts=_MISTRAL_MARK in answer)

    return bounded


def _llama3_json(answer: str, tools: Sequence[ToolSpec]) -> ParsedAnswer:
    """JSON objects alone, `;` or white space between them. Any other JSON is an answer."""
    body = answer.strip().removeprefix(_LLAMA_MARK)
    if not _LLAMA_CALL.match(body):
        return ParsedAnswer(answer.strip(), (), None)
    calls: list[ToolCall] = []
    position = 0
    while position < len(body):
        value, position = read_json(body, position)
        calls.append(_named(value, "parameters", f"call_{len(calls)}"))
        position += len(body[position:]) - len(body[position:].lstrip(" \n\t;"))
    return ParsedAnswer("", tuple(calls), None)


def _mistral(answer: str, tools: Sequence[ToolSpec]) -> ParsedAnswer:
    """`[TOOL_CALLS]` and a list of calls, or the mark, a name and arguments for each call."""
    text, mark, rest = answer.partition(_MISTRAL_MARK)
    calls: list[ToolCall] = []
    while mark:
        if rest.lstrip().startswith("["):
            values, end = read_json(rest, 0)
            for value in values:
                calls.append(_named(value, "arguments", _mistral_id(len(calls))))
        elif named := _MISTRAL_NAME.match(rest):
            value, end = read_json(rest, named.end())
            calls.append(checked_call({"name": named["name"], "arguments": value}, _mistral_id(len(calls))))
        else:
            raise ValueError(f"{_MISTRAL_MARK} must be followed by a list of calls, or by a name and an object")
        if rest[end:].strip() and not rest[end:].lstrip().startswith(_MISTRAL_MARK):
            raise ValueError("tool call goes on behind its JSON")
        _, mark, rest = rest[end:].partition(_MISTRAL_MARK)
    # Mistral's templates count turns by their calls, and write the marks themselves.
    return ParsedAnswer(text.strip(), tuple(calls), None, as_parts=True)


def _mistral_id(number: int) -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return f"call{number:05d}"


def _named(value: Any, key: str, call_id: str) -> ToolCall:
    """The call that an object names, its arguments under `key` or under the name that other families use."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f'tool call must be an object with "name" and "{key}"')
    other = value.get("arguments", value.get("parameters", {}))
    return checked_call({"name": value["name"], "arguments": value.get(key, other)}, call_id)


def _pythonic(answer: str, tools: Sequence[ToolSpec]) -> ParsedAnswer:
    """A Python list of calls with keyword arguments that are literals; it is read, never run."""
    if not _PYTHONIC_CALL.match(answer):
        return ParsedAnswer(answer.strip(), (), None)
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"tool calls are not a Python list: {getattr(error, 'msg', 'nested too deeply')}") from error
    nodes = tree.elts if isinstance(tree, ast.List) else []
    return ParsedAnswer("", tuple(_python_call(node, f"call_{n}") for n, node in enumerate(nodes)), None)


def _python_call(node: ast.expr, call_id: str) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("tool calls must be a list of calls with arguments by name")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("tool call must give each argument by name, once")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(f"argument {keyword.arg!r} of a tool call is not a literal") from error
    try:
        json.dumps(arguments)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"tool call has an argument that is no JSON value: {error}") from error
    return checked_call({"name": ast.unparse(node.func), "arguments": arguments}, call_id)


_XML_TEMPLATE = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]{1,128})>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "text": {"content": "text", "repeats": True},
    },
}
"""transformers' own response template of Qwen 3.5 without what it says of turns, which an engine cuts off."""


def _qwen3_coder(answer: str, tools: Sequence[ToolSpec]) -> ParsedAnswer:
    from transformers.utils.chat_parsing import parse_response

    if "</function>" in answer and OPEN not in answer:
        raise ValueError(f"</function> without {OPEN}")
    try:
        found = parse_response(answer, _XML_TEMPLATE, prefix="", tools=template_tools(tools) or [])
    except Exception as error:
        # Whatever the library raises, it is about what the model wrote.
        raise ValueError(f"tool call cannot be read: {type(error).__name__}") from error
    calls = found.get("calls", [])
    if len(calls) != answer.count(OPEN) or answer.count(OPEN) != answer.count(CLOSE):
        raise ValueError(f"{OPEN} must hold <function=NAME>...</function> and end with {CLOSE}")
    read = [checked_call(call["function"], f"call_{number}") for number, call in enumerate(calls)]
    return ParsedAnswer("\n".join(found.get("text", [])).strip(), tuple(read), None)


def _write_qwen3_coder(name: str, arguments: dict[str, Any]) -> str:
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in shown.items())
    return f"{OPEN}\n<function={name}>\n{lines}</function>\n{CLOSE}"


HERMES = CallForm(
    "hermes",
    f'write a call as {OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}, or answer without one',
    lambda answer, tools: parse_answer(answer),
    write_call,
    can_be_guided=True,
)

FORMS = {
    form.name: form
    for form in (
        HERMES,
        CallForm(
            "llama3_json",
            'write a call as {"name": "...", "parameters": {...}} and nothing else, or answer without one',
            _bounded(_llama3_json),
            lambda name, arguments: json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False),
        ),
        CallForm(
            "mistral",
            f'write calls as {_MISTRAL_MARK} [{{"name": "...", "arguments": {{...}}}}], or answer without one',
            _bounded(_mistral),
            lambda name, arguments: f"{_MISTRAL_MARK}{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}",
            special_tokens=True,
        ),
        CallForm(
            "pythonic",
            'write calls as [name(argument="...")] and nothing else, or answer without one',
            _bounded(_pythonic, MAX_LIBRARY_CHARS),
            lambda name, arguments: f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]",
        ),
        CallForm(
            "qwen3_coder",
            f"write a call as {OPEN}<function=NAME><parameter=ARGUMENT>...</parameter></function>{CLOSE}, "
            "or answer without one",
            _bounded(_qwen3_coder, MAX_LIBRARY_CHARS),
            _write_qwen3_coder,
            needs=CHAT_PARSING,
        ),
    )
}
"""By name. `pythonic` is never guessed: its templates look like many others."""


def strict_fault(form: CallForm, tools: Sequence[ToolSpec]) -> str | None:
    """Why these tools cannot be offered in this form, with the remedy, or None."""
    strict = next((tool.name for tool in tools if tool.strict), None)
    if strict is None or form.can_be_guided:
        return None
    return (
        f"tool {strict!r} is strict, but calls are written as {form.name} (agent.tool_call_format), and only calls as "
        "hermes can be guided: drop strict, or serve a model whose chat template writes hermes"
    )


def form_of_template(template: str) -> CallForm:
    """The form whose marks a chat template writes; hermes where it writes none."""
    for mark, name in (
        ("<function=", "qwen3_coder"),
        (OPEN, "hermes"),
        (_MISTRAL_MARK, "mistral"),
        (_LLAMA_MARK, "llama3_json"),
    ):
        if mark in template:
            return FORMS[name]
    return HERMES
