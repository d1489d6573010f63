"""The one registry of an application's tools: wherever they run, one executor runs them, in one order.

`open_tools` starts what the tools need (worker processes for Python functions) and ends it with the block; live
serving, practice and evaluation all open their tools here. Owns the order in which the model sees them, and that a
call is checked against its schema and its effect before anything runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from nightschool_server.agent.arguments import arguments_fault
from nightschool_server.agent.executors import failed, unknown
from nightschool_server.app import App
from nightschool_server.chat import ToolCall, ToolSpec
from nightschool_server.tools.effects import Effect, Purpose, conduct_of, refusal
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.tool import Tool
from nightschool_server.tools.workers import DEFAULT_MAX_OUTPUT_CHARS, ToolOutcome, ToolWorkers

RunCall = Callable[[dict[str, Any], ToolState, float], Awaitable[ToolOutcome]]
"""Runs a tool with checked arguments for at most so many seconds; an error is an outcome, only cancellation raises."""


@dataclass(frozen=True)
class OpenTool:
    """A tool that can be called now."""

    spec: ToolSpec
    effect: Effect
    closed: bool
    """Whether arguments that the schema does not name are refused, where it does not say itself."""
    timeout_s: float
    """What one call may take."""
    run: RunCall
    simulate: RunCall | None = None
    """Answers in practice in place of an external tool."""


class Toolbox:
    """The tools of an application, open. A `ToolExecutor`."""

    def __init__(self, tools: Sequence[OpenTool] = (), purpose: Purpose = "live") -> None:
        self._tools = {tool.spec.name: tool for tool in tools}
        self._purpose = purpose
        self.tools: tuple[ToolSpec, ...] = tuple(tool.spec for tool in tools)

    def is_read_only(self, name: str) -> bool:
        tool = self._tools.get(name)
        return tool is not None and tool.effect == "read_only"

    def is_external(self, name: str) -> bool:
        tool = self._tools.get(name)
        return tool is not None and tool.effect == "external"

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        tool = self._tools.get(call.name)
        if tool is None:
            return unknown(call, self.tools, state)
        arguments = json.loads(call.arguments)
        if fault := arguments_fault(tool.spec.parameters, arguments, closed=tool.closed):
            return failed("schema", fault, state)
        timeout_s = min(tool.timeout_s, max_s)
        match conduct_of(tool.effect, self._purpose, can_simulate=tool.simulate is not None):
            case "refuse":
                return failed("refused", refusal(call.name, tool.effect), state)
            case "simulate":
                assert tool.simulate is not None
                return replace(await tool.simulate(arguments, state, timeout_s), simulated=True)
            case "run":
                return await tool.run(arguments, state, timeout_s)


@asynccontextmanager
async def open_tools(
    app: App,
    app_ref: str,
    *,
    num_workers: int = 2,
    max_output_chars: int = DEFAULT_MAX_OUTPUT_CHARS,
    purpose: Purpose = "live",
) -> AsyncIterator[Toolbox]:
    """The tools of `app`, which `app_ref` names for its workers, for as long as the block runs. Raises AppError.

    Where there is no Python function, no worker is started.
    """
    async with AsyncExitStack() as stack:
        tools: list[OpenTool] = []
        if app.tools:
            started = await ToolWorkers.start(app_ref, num_workers, max_output_chars=max_output_chars)
            workers = await stack.enter_async_context(started)
            tools += [_python_tool(tool, app.timeout_s(tool), workers) for tool in app.tools]
        yield Toolbox(tools, purpose)


def _python_tool(tool: Tool, timeout_s: float, workers: ToolWorkers) -> OpenTool:
    async def run(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        return await workers.run(tool.spec.name, arguments, state, max_s)

    async def simulate(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        return await workers.run(tool.spec.name, arguments, state, max_s, simulate=True)

    return OpenTool(tool.spec, tool.effect, True, timeout_s, run, simulate if tool.simulate else None)
