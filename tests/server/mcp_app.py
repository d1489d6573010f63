"""An application with a function, an MCP server's tools, and room for a client's: for tests of the three together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nightschool_server.app import App, McpServer, tool

PROBE = [sys.executable, "-S", str(Path(__file__).with_name("mcp_probe.py"))]


@tool(effect="read_only")
def crash(how: str) -> str:
    """End in the way that is asked for.

    Args:
        how: exit, or what to say.
    """
    if how == "exit":
        os._exit(1)
    return how


@tool(effect="read_only", timeout_s=0.5)
def hang() -> str:
    """Never end."""
    while True:
        pass


def pretend_to_send(text: str) -> str:
    """What practice is told of a message."""
    return f"would have sent {text}"


app = App(
    name="probes",
    system_prompt="You probe.",
    tools=[crash, hang],
    mcp=[
        McpServer(
            "probe",
            command=PROBE,
            include=["echo", "send", "pid", "kill", "wait", "everything"],
            simulate={"send": pretend_to_send},
        )
    ],
    tool_order=["probe.echo", "ask", "crash"],
    tool_timeout_s=60,
)
