"""What `nightschool check` finds about an application's tools: Python functions and those of its MCP servers.

Starts every MCP server, one after the other, to ask for its tools, and ends it again; runs no tool.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from nightschool_server.agent.arguments import schema_fault
from nightschool_server.agent.call_forms import CallForm
from nightschool_server.agent.call_forms import strict_fault as form_fault
from nightschool_server.agent.mcp_tools import open_mcp_tools
from nightschool_server.agent.open_tool import OpenTool
from nightschool_server.agent.toolbox import checked
from nightschool_server.app import App
from nightschool_server.chat import ToolSpec
from nightschool_server.engines.guidance import strict_fault
from nightschool_server.errors import AppError
from nightschool_server.findings import Finding
from nightschool_server.mcp.server import McpServer
from nightschool_server.tools.effects import Effect, conduct_of
from nightschool_server.tools.tool import Tool
from nightschool_server.tools.workers import DEFAULT_LIMITS


def examine_tools(app: App, form: CallForm) -> tuple[tuple[ToolSpec, ...], list[Finding]]:
    """The tools that can be had, in the order in which the model sees them, and what is to be said of each."""
    if not app.tools and not app.mcp:
        text = "none: RunTask is one answer of the model unless the client brings tools"
        return (), [Finding("tools", "", "no", text)]
    found = [_tool(tool, form) for tool in app.tools]
    listed: list[tuple[ToolSpec, str]] = [(tool.spec, tool.where) for tool in app.tools]
    for server in app.mcp:
        try:
            tools = asyncio.run(_tools_of(app, server))
        except AppError as error:
            found.append(Finding("mcp", server.name, "fault", near(str(error))))
            continue
        found += _server(server, tools)
        listed += [(tool.spec, tool.where) for tool in tools]
    try:
        return checked(app, listed), found
    except AppError as error:
        return app.specs, [*found, Finding("tools", "names", "fault", near(str(error)))]


def near(place: object) -> str:
    """A path, or a text with paths in it, as seen from the current folder, where they are below that."""
    return str(place).replace(f"{os.getcwd()}/", "")


def _tool(tool: Tool, form: CallForm) -> Finding:
    spec, where = tool.spec, near(tool.where)
    if fault := schema_fault(spec.parameters):
        return Finding("tools", spec.name, "fault", f"its schema is wrong: {fault} ({where})")
    if fault := strict_fault(spec) or form_fault(form, [spec]):
        return Finding("tools", spec.name, "fault", f"{fault} ({where})")
    about, refused = _conduct(tool.effect, can_simulate=tool.simulate is not None)
    about += ", strict" if spec.strict else ""
    if refused:
        remedy = "give it a simulator, or declare a smaller effect if it has one"
        return Finding("tools", spec.name, "no", f"{about}: practice never runs it: {remedy} ({where})")
    undescribed = _undescribed(spec)
    if undescribed:
        lacking = f"the docstring's Args: does not describe {', '.join(undescribed)}"
        return Finding("tools", spec.name, "no", f"{about}, but {lacking} ({where})")
    return Finding("tools", spec.name, "ok", f"{about} ({where})")


def _server(server: McpServer, tools: Sequence[OpenTool]) -> Iterator[Finding]:
    yield Finding("mcp", server.name, "ok", f"starts, {len(tools)} tools ({near(server.where)})")
    if not tools:
        yield Finding("mcp", server.name, "no", "offers no tool: mend include and exclude, or leave the server out")
    simulated = {server.tool_name(name) for name in server.simulate}
    for tool in tools:
        name = tool.spec.name
        about, refused = _conduct(tool.effect, can_simulate=name in simulated)
        if refused:
            remedy = "name its effect in effects={...}, or give it a simulator in simulate={...}"
            yield Finding("mcp", name, "no", f"{about}: practice never runs it: {remedy}")
        elif not tool.spec.description:
            yield Finding("mcp", name, "no", f"{about}, but the server does not describe it")
        else:
            yield Finding("mcp", name, "ok", about)


def _conduct(effect: Effect, *, can_simulate: bool) -> tuple[str, bool]:
    """The effect and what practice makes of it, and whether practice refuses it."""
    conduct = conduct_of(effect, "practice", can_simulate=can_simulate)
    return f"{effect}{', simulated in practice' if conduct == 'simulate' else ''}", conduct == "refuse"


def _undescribed(spec: ToolSpec) -> list[str]:
    """Parameters that the model is told nothing about."""
    properties = spec.schema.get("properties", {})
    return [name for name, schema in properties.items() if isinstance(schema, dict) and "description" not in schema]


async def _tools_of(app: App, server: McpServer) -> list[OpenTool]:
    async with AsyncExitStack() as stack:
        return await open_mcp_tools(replace(app, mcp=(server,)), stack, limits=DEFAULT_LIMITS)
