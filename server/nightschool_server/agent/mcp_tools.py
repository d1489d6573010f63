"""The tools of an application's MCP servers: sessions opened, names and schemas checked, effects decided.

Owns the way from what a server lists to tools that the toolbox runs. The mcp library takes a second to import, so it is
imported where an application has MCP servers, and nowhere else.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nightschool_server.agent.arguments import schema_fault
from nightschool_server.agent.executors import failed
from nightschool_server.agent.open_tool import OpenTool, RunCall
from nightschool_server.app import App
from nightschool_server.chat import ToolSpec, canonical_json
from nightschool_server.engines.guidance import strict_fault
from nightschool_server.errors import AppError
from nightschool_server.mcp.server import McpServer
from nightschool_server.tools.call import truncate
from nightschool_server.tools.effects import Effect
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.tool import TOOL_NAME, parameters_of, where_of
from nightschool_server.tools.workers import CallLimits, ToolFailure, ToolOutcome, ToolWorkers

if TYPE_CHECKING:
    from mcp_types import Tool

    from nightschool_server.mcp.session import McpSession

COMBINATORS = frozenset({"anyOf", "oneOf", "allOf", "$ref"})
"""Where a schema's root has one of these, `properties` need not name every argument."""


async def open_mcp_tools(
    app: App, stack: AsyncExitStack, *, limits: CallLimits, workers: ToolWorkers | None = None
) -> list[OpenTool]:
    """The tools of every MCP server of `app`, all servers started at once; `stack` ends them. Raises AppError.

    `workers` run the simulators, where they are wanted.
    """
    if not app.mcp:
        return []
    from nightschool_server.mcp.session import McpSession

    async def start(server: McpServer) -> McpSession:
        session = await McpSession.start(server)
        stack.push_async_callback(session.close)
        return session

    # All are waited for, so that none is still starting when the others are ended.
    sessions = await asyncio.gather(*(start(server) for server in app.mcp), return_exceptions=True)
    tools: list[OpenTool] = []
    for session in sessions:
        if isinstance(session, BaseException):
            raise session
        opened = _tools_of(session, app, limits)
        tools += opened if workers is None else [_simulated(tool, app, workers) for tool in opened]
    return tools


def _tools_of(session: McpSession, app: App, limits: CallLimits) -> list[OpenTool]:
    server = session.server
    names = [tool.name for tool in session.tools]
    for option in ("include", "exclude", "effects", "simulate"):
        _check_named(server, option, names)
    wanted = names if server.include is None else server.include
    timeout_s = server.timeout_s or app.tool_timeout_s or limits.timeout_s
    return [
        OpenTool(
            spec=_spec(server, tool),
            effect=_effect(server, tool),
            where=server.label,
            closed=_is_closed(tool.input_schema),
            timeout_s=timeout_s,
            run=_run(session, tool.name, limits, repeat=_effect(server, tool) == "read_only"),
        )
        for tool in session.tools
        if tool.name in wanted and tool.name not in server.exclude
    ]


def _check_named(server: McpServer, option: str, names: list[str]) -> None:
    for name in getattr(server, option) or ():
        if name not in names:
            raise AppError(
                f"{server.label}: {option} names {name!r}, which it does not have; "
                f"its tools are {', '.join(names) or 'none'}"
            )


def _simulated(tool: OpenTool, app: App, workers: ToolWorkers) -> OpenTool:
    """The tool with its simulator, where it has one, which runs in a worker like every function of the application."""
    simulator, name = app.simulator(tool.spec.name), tool.spec.name
    if simulator is None:
        return tool

    async def simulate(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        return await workers.run(name, arguments, state, max_s, simulate=True)

    return replace(tool, simulate=simulate)


def _check_simulator(server: McpServer, tool: Tool) -> None:
    """The simulator of an external tool takes what the tool takes."""
    function = server.simulate.get(tool.name)
    if function is None:
        return
    where = f"{where_of(function)}: the simulator of tool {tool.name!r} of {server.label}"
    if (effect := _effect(server, tool)) != "external":
        raise AppError(f"{where} is of no use: the tool is {effect}, and practice runs it itself: leave it out")
    if tool.input_schema.get("properties", {}).keys() != parameters_of(function, where):
        names = ", ".join(tool.input_schema.get("properties", {})) or "nothing"
        raise AppError(f"{where} must take what the tool takes: {names}")


def _spec(server: McpServer, tool: Tool) -> ToolSpec:
    name, schema = server.tool_name(tool.name), canonical_json(tool.input_schema)
    _check_simulator(server, tool)
    if not TOOL_NAME.fullmatch(name):
        raise AppError(
            f"{server.label}: its tool {tool.name!r} would be called {name!r}, which must match {TOOL_NAME.pattern}: "
            "give the server another prefix, or leave the tool out with exclude"
        )
    if fault := schema_fault(schema):
        raise AppError(
            f"{server.label}: the schema of its tool {tool.name!r} is wrong: {fault}: leave it out with exclude"
        )
    spec = ToolSpec(name, tool.description or tool.title or "", schema, server.strict)
    if fault := strict_fault(spec):
        raise AppError(f"{server.label}: {fault}")
    return spec


def _effect(server: McpServer, tool: Tool) -> Effect:
    """What the application says, else what the server's annotations say, else the worst."""
    if tool.name in server.effects:
        return server.effects[tool.name]
    hints = tool.annotations
    # One that reads the open world gives practice's every try away to strangers, and rarely the same twice.
    is_read_only = hints is not None and hints.read_only_hint is True and hints.open_world_hint is not True
    return "read_only" if is_read_only else "external"


def _is_closed(schema: dict[str, Any]) -> bool:
    return "properties" in schema and not COMBINATORS & schema.keys()


def _run(session: McpSession, name: str, limits: CallLimits, *, repeat: bool) -> RunCall:
    from nightschool_server.mcp.content import observation_of
    from nightschool_server.mcp.session import CallFailedError

    async def run(arguments: dict[str, Any], state: ToolState, max_s: float) -> ToolOutcome:
        started = time.perf_counter()
        try:
            result = await session.call(name, arguments, max_s, repeat=repeat)
        except CallFailedError as error:
            seconds = time.perf_counter() - started
            return failed(error.failure, truncate(str(error), limits.max_output_chars), state, seconds)
        seen = await observation_of(result, limits.returned.images)
        seconds, text = time.perf_counter() - started, truncate(seen.text, limits.max_output_chars)
        failure: ToolFailure = "execution" if seen.is_error else ""
        is_json = seen.is_json and text == seen.text
        return ToolOutcome(text, seen.is_error, failure, state, seconds, seen.images, is_json=is_json)

    return run
