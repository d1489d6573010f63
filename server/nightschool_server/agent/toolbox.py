"""The one registry of an application's tools: wherever they run, one executor runs them, in one order.

`open_tools` starts what the tools need (worker processes for Python functions, sessions with MCP servers) and ends it
with the block; live serving, practice and evaluation all open their tools here. Owns the order in which the model
sees them, and that a call is checked against its schema and its effect before anything runs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from nightschool_server.agent.arguments import arguments_fault
from nightschool_server.agent.executors import failed, in_order, unknown
from nightschool_server.agent.mcp_tools import open_mcp_tools
from nightschool_server.agent.open_tool import OpenTool
from nightschool_server.app import App
from nightschool_server.chat import ToolCall, ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.tools.effects import Purpose, conduct_of, refusal
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.tool import Tool
from nightschool_server.tools.workers import DEFAULT_LIMITS, CallLimits, ToolOutcome, ToolWorkers

logger = logging.getLogger(__name__)


class Toolbox:
    """The tools of an application, open. A `ToolExecutor`."""

    def __init__(
        self, specs: tuple[ToolSpec, ...] = (), tools: Sequence[OpenTool] = (), purpose: Purpose = "live"
    ) -> None:
        """`specs` are those of `tools`, in the order in which the model sees them."""
        self._tools = {tool.spec.name: tool for tool in tools}
        self._purpose = purpose
        self.tools = specs

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
    limits: CallLimits = DEFAULT_LIMITS,
    purpose: Purpose = "live",
) -> AsyncIterator[Toolbox]:
    """The tools of `app`, which `app_ref` names for its workers, for as long as the block runs. Raises AppError.

    Where there is no Python function to run, no worker is started.
    """
    async with AsyncExitStack() as stack:
        tools: list[OpenTool] = []
        workers = None
        if app.tools or (purpose == "practice" and any(server.simulate for server in app.mcp)):
            started = await ToolWorkers.start(app_ref, num_workers, limits=limits)
            workers = await stack.enter_async_context(started)
            tools += [_python_tool(tool, app.timeout_s(tool) or limits.timeout_s, workers) for tool in app.tools]
        tools += await open_mcp_tools(app, stack, limits=limits, workers=workers)
        specs = checked(app, [(tool.spec, tool.where) for tool in tools])
        yield Toolbox(specs, tools, purpose)


async def list_tools(app: App) -> tuple[ToolSpec, ...]:
    """The tools of `app` as the model sees them. Asks its MCP servers; starts no worker. Raises AppError."""
    async with AsyncExitStack() as stack:
        mcp = await open_mcp_tools(app, stack, limits=DEFAULT_LIMITS)
    python = [(tool.spec, tool.where) for tool in app.tools]
    return checked(app, [*python, *((tool.spec, tool.where) for tool in mcp)])


def checked(app: App, tools: Sequence[tuple[ToolSpec, str]]) -> tuple[ToolSpec, ...]:
    """The tools, each with its place, in the application's order. Raises AppError where two have one name."""
    places: dict[str, str] = {}
    for spec, where in tools:
        if spec.name in places:
            raise AppError(
                f"app {app.name!r} has two tools called {spec.name!r}, from {places[spec.name]} and from {where}: "
                "rename one, give the MCP server a prefix, or leave the tool out with exclude"
            )
        places[spec.name] = where
    if missing := [name for name in app.tool_order if name not in places]:
        logger.info("event=tools_left_to_clients names=%s", ",".join(missing))
    return in_order([spec for spec, _ in tools], app.tool_order)


def _python_tool(tool: Tool, timeout_s: float, workers: ToolWorkers) -> OpenTool:
    async def run(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        return await workers.run(tool.spec.name, arguments, state, max_s)

    async def simulate(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        return await workers.run(tool.spec.name, arguments, state, max_s, simulate=True)

    simulator = simulate if tool.simulate else None
    return OpenTool(tool.spec, tool.effect, tool.where, True, timeout_s, run, simulator)
