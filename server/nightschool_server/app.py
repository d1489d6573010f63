"""What an application brings: its name, system prompt, tools, MCP servers, initial state and held-out tasks.

    from nightschool_server.app import App, ToolContext, tool

    @tool(effect="read_only")
    def price(item: str) -> int:
        \"\"\"The price of one item.\"\"\"
        return PRICES[item]

    app = App(name="shop", system_prompt="You help in a shop.", tools=[price])

Owns `App` and `load_app`; everything that an application's module needs is importable from here. Light:
tool workers import this module, so neither torch nor jsonschema is loaded by it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from nightschool_server.chat import ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.evaluation_set import EvaluationSet, EvaluationTask, is_correct, read_evaluation
from nightschool_server.mcp.server import McpServer
from nightschool_server.scorer import SCORER_TOOL, ScoredStep, Scorer
from nightschool_server.tools.content import ToolFile, ToolImage
from nightschool_server.tools.effects import Effect
from nightschool_server.tools.tool import Tool, ToolContext, tool

__all__ = [
    "App", "AppError", "Effect", "EvaluationSet", "EvaluationTask", "McpServer", "ScoredStep", "Tool", "ToolContext",
    "ToolFile", "ToolImage", "is_correct", "load_app", "load_evaluation", "tool",
]  # fmt: skip


@dataclass(frozen=True)
class App:
    """One application. Raises AppError where something about it is wrong."""

    name: str
    system_prompt: str
    tools: Sequence[Tool] = ()
    """Kept as a tuple, in the order in which the model sees them."""
    evaluation: Path | None = None
    """Held-out tasks as JSON lines, see `evaluation_set.py`. Without them nothing is ever promoted."""
    initial_state: Mapping[str, Any] = field(default_factory=dict)
    """What `ToolContext.state` holds when a task begins; JSON values."""
    mcp: Sequence[McpServer] = ()
    """MCP servers whose tools are offered too, behind `tools`."""
    tool_order: Sequence[str] = ()
    """Names of tools in the order in which the model sees them; those that it does not name come behind, in the order
    of `tools`, `mcp` and the client's. It may name a tool that only a client brings."""
    max_steps: int = 8
    tool_timeout_s: float | None = None
    """Of tools that do not say themselves. None takes the server's `agent.tool_timeout_s`."""
    unsafe: Sequence[str] = ()
    """Regular expressions of what must not be done. The gate holds them against every call of an evaluation, written
    `name {"argument": ...}`, and against final answers; a candidate that does more of it is not promoted."""
    scorer: Scorer = field(default_factory=Scorer)
    """Scores candidates for the critic, see `scorer.py`: a function here, or one under `@app.scorer`."""
    gold: Path | None = None
    """Comparisons that people or a rule decided, as JSON lines, see docs/critic.md: the critic is audited on them."""

    def __post_init__(self) -> None:
        for name in ("tools", "mcp", "tool_order", "unsafe"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.scorer, Scorer):
            object.__setattr__(self, "scorer", Scorer(self.scorer))
        if not self.name.strip():
            raise AppError("App(name=...) is empty: give the application a name")
        if not 1 <= self.max_steps <= 100:
            raise AppError(f"app {self.name!r}: max_steps is {self.max_steps}; it must be 1 to 100")
        if self.tool_timeout_s is not None and not 0 < self.tool_timeout_s <= 3600:
            raise AppError(
                f"app {self.name!r}: tool_timeout_s is {self.tool_timeout_s}; it must be above 0, at most 3600"
            )
        try:
            json.dumps(dict(self.initial_state), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AppError(f"app {self.name!r}: initial_state is not made of JSON values: {error}") from error
        self._check_unsafe()
        self._check_tools()
        self._check_mcp()

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """The Python functions as the model sees them; `agent.toolbox` knows those of MCP servers too."""
        return tuple(tool.spec for tool in self.tools)

    def tool(self, name: str) -> Tool | None:
        """The tool of that name."""
        if name == SCORER_TOOL:
            return self.scorer.tool
        return next((tool for tool in self.tools if tool.spec.name == name), None)

    def simulator(self, name: str) -> Tool | None:
        """What answers in practice in place of an MCP server's tool of that name."""
        return next((tool for server in self.mcp for tool in server.simulators if tool.spec.name == name), None)

    def timeout_s(self, tool: Tool) -> float | None:
        """How long a call of `tool` may take, where it or the application says so."""
        return self.tool_timeout_s if tool.timeout_s is None else tool.timeout_s

    def _check_unsafe(self) -> None:
        for pattern in self.unsafe:
            try:
                re.compile(pattern)
            except re.error as error:
                raise AppError(
                    f"app {self.name!r}: unsafe pattern {pattern!r} is no regular expression: {error}"
                ) from error

    def _check_tools(self) -> None:
        seen: dict[str, Tool] = {}
        for entry in self.tools:
            if not isinstance(entry, Tool):
                name = getattr(entry, "__name__", repr(entry))
                raise AppError(f"app {self.name!r}: {name} is not a tool: put @tool(effect=...) above its definition")
            name = entry.spec.name
            if name in seen:
                raise AppError(
                    f"app {self.name!r} has two tools called {name!r}, "
                    f"at {seen[name].where} and {entry.where}: rename one"
                )
            seen[name] = entry
        if len(set(self.tool_order)) != len(self.tool_order):
            raise AppError(f"app {self.name!r}: tool_order names a tool twice: {', '.join(self.tool_order)}")

    def _check_mcp(self) -> None:
        seen: dict[str, McpServer] = {}
        for server in self.mcp:
            if not isinstance(server, McpServer):
                raise AppError(f"app {self.name!r}: {server!r} in mcp is not an McpServer: write McpServer(name, ...)")
            if server.name in seen:
                raise AppError(
                    f"app {self.name!r} has two MCP servers called {server.name!r}, "
                    f"at {seen[server.name].where} and {server.where}: rename one"
                )
            seen[server.name] = server


def load_app(ref: str) -> App:
    """Import the application that `module:attribute` names, the current folder among the places looked in.

    Raises AppError with the remedy. Tool schemas are checked here, so that a wrong one stops the start.
    """
    from nightschool_server.agent.arguments import schema_fault
    from nightschool_server.engines.guidance import strict_fault

    app = import_app(ref)
    for entry in app.tools:
        if fault := schema_fault(entry.spec.parameters):
            raise AppError(f"app {ref!r}: the schema of tool {entry.spec.name!r} ({entry.where}) is wrong: {fault}")
        if fault := strict_fault(entry.spec):
            raise AppError(f"app {ref!r}: {entry.where}: {fault}")
    return app


def import_app(ref: str) -> App:
    """`load_app` without the check of the schemas: what a tool worker does."""
    module_name, colon, attribute = ref.partition(":")
    if not (module_name and colon and attribute):
        raise AppError(f"app {ref!r} must be written module:attribute, e.g. examples.shop.app:app")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    app = getattr(_import(module_name, ref), attribute, None)
    if app is None:
        raise AppError(
            f"app {ref!r}: module {module_name!r} has no {attribute!r}: write `{attribute} = App(...)` in it"
        )
    if not isinstance(app, App):
        raise AppError(f"app {ref!r} is a {type(app).__name__}, not an App: write `{attribute} = App(...)`")
    return app


def load_evaluation(app: App) -> EvaluationSet:
    """The application's held-out tasks. Raises AppError with file, line and rule."""
    if app.evaluation is None:
        raise AppError(
            f"app {app.name!r} has no evaluation set: give App(evaluation=Path(...)) a file of held-out tasks"
        )
    return read_evaluation(Path(app.evaluation))


def _import(module_name: str, ref: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except AppError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise AppError(
                f"app {ref!r}: no module {error.name!r} in {os.getcwd()} or on the Python path: "
                "start in the folder that holds it"
            ) from error
        raise AppError(f"app {ref!r} imports {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise AppError(
            f"app {ref!r}: importing it raised {type(error).__name__}: {error}{_place(error, module_name)}"
        ) from error


def _place(error: BaseException, module_name: str) -> str:
    """` (at FILE:LINE)`: the innermost line below the folder of the application's module that led to `error`."""
    if isinstance(error, SyntaxError):
        return ""  # Python says it in the message.
    spec = importlib.util.find_spec(module_name)
    folder = str(Path(spec.origin).parent) if spec is not None and spec.origin is not None else os.getcwd()
    lines = [f"{f.filename}:{f.lineno}" for f in extract_tb(error.__traceback__) if f.filename.startswith(folder + "/")]
    return f" (at {lines[-1]})" if lines else ""
