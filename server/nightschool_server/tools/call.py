"""One call of a tool, inside the child process that was forked for it.

Owns how arguments reach the function, how what it returns or raises becomes an observation, and how its
state is taken back. Everything else that the call changes dies with its process.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nightschool_server.app import App
from nightschool_server.chat import canonical_json
from nightschool_server.tools.content import holds_content, take_apart
from nightschool_server.tools.tool import Tool, ToolContext, tool

MAX_STATE_CHARS = 2**20
MAX_TRACEBACK_CHARS = 4000


def perform(app: App, call: dict[str, Any]) -> dict[str, Any]:
    """Run `{"name", "arguments", "state", "workspace", "max_output_chars", "simulate"}`.

    Gives `{"failure", "content", "state"?, "is_json"?, "returned"?, "traceback"?}`; the state is there only where the
    call succeeded, what it returned where that is more than text. Changes the working directory.
    """
    tool = app.tool(call["name"]) or app.simulator(call["name"])
    if tool is None:
        return _failure("unknown_tool", unknown_tool(call["name"], [spec.name for spec in app.specs]))
    workspace = Path(call["workspace"])
    workspace.mkdir(parents=True, exist_ok=True)  # An earlier tool may have removed it.
    os.chdir(workspace)
    context = ToolContext(json.loads(call["state"]), workspace)
    try:
        prepared = tool.prepare(call["arguments"], context, simulate=call["simulate"])
    except (TypeError, ValueError) as error:
        return _failure("schema", str(error))
    try:
        value = _run(prepared)
        content, items = _rendered(value, workspace)
        state = _state_after(tool, context, call["state"])
    except BaseException as error:
        return {
            **_failure("execution", describe_error(error)),
            "traceback": traceback.format_exc()[-MAX_TRACEBACK_CHARS:],
        }
    shown = truncate(content, call["max_output_chars"])
    is_json = not items and shown is content and not (value is None or isinstance(value, str))
    reply = {"failure": "", "content": shown, "state": state, "is_json": is_json}
    return {**reply, "returned": items} if items else reply


def warm_up() -> dict[str, Any]:
    """Run a call of nothing, so that the pages which a call copies are copied before there is one."""
    return perform(_NOTHING, json.loads(_CALL_OF_NOTHING))


def render(value: Any) -> str:
    """What the model sees of a returned value: text as it is, anything else as compact JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return "done"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_as_json)


def describe_error(error: BaseException) -> str:
    """What the model sees of an exception: the message, and its type where that is Python's own.

    A ValueError and an exception of the application speak for themselves.
    """
    kind = type(error)
    if kind is MemoryError and not str(error):
        return "MemoryError: the tool needs more memory than a call may take"
    speaks = isinstance(error, ValueError) or kind.__module__ != "builtins"
    if speaks and str(error):
        return str(error)
    return f"{kind.__name__}: {error}" if str(error) else kind.__name__


def truncate(text: str, max_chars: int) -> str:
    """The first `max_chars` characters of `text`, and a mark where there were more."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[truncated: {max_chars} of {len(text)} characters]"


def unknown_tool(name: str, known: list[str]) -> str:
    """The hint for a name that no tool has."""
    return f"no tool is called {name!r}; the tools are {', '.join(known) or 'none'}"


def _nothing(context: ToolContext, number: int) -> int:
    """Do nothing."""
    return number


_NOTHING = App("nothing", "", [tool(effect="workspace")(_nothing)])
_CALL_OF_NOTHING = json.dumps(
    {
        "name": "_nothing", "arguments": {"number": 1}, "state": "{}", "workspace": "/", "max_output_chars": 1,
        "simulate": False,
    }
)  # fmt: skip


def _failure(failure: str, content: str) -> dict[str, Any]:
    return {"failure": failure, "content": f"error: {content}"}


def _run(prepared: Callable[[], Any]) -> Any:
    value = prepared()
    if not inspect.isawaitable(value):
        return value
    # Applications without async tools are spared the import, and their workers its memory.
    import asyncio

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _rendered(value: Any, workspace: Path) -> tuple[str, list[dict[str, str]]]:
    """What the model reads of a returned value, and the images and files in it."""
    if not holds_content(value):
        return render(value), []
    returned = take_apart(value, workspace)
    return "\n".join(render(text) for text in returned.texts), returned.items


def _state_after(tool: Tool, context: ToolContext, before: str) -> str:
    if not isinstance(context.state, dict):
        raise TypeError(f"ctx.state became a {type(context.state).__name__}; it must stay a dict")
    try:
        after = canonical_json(context.state)
    except (TypeError, ValueError) as error:
        raise TypeError(f"ctx.state holds what is not a JSON value: {error}") from error
    if len(after) > MAX_STATE_CHARS:
        raise ValueError(f"ctx.state has {len(after)} characters as JSON; at most {MAX_STATE_CHARS} are kept")
    if tool.effect == "read_only" and after != before:
        raise RuntimeError(f"tool {tool.spec.name!r} is declared read_only but changed ctx.state: declare workspace")
    return after


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a tool returned a {type(value).__name__}: return text, a number, a list or a dict")
