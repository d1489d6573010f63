"""An application for `bench/agent.py`: functions that do nothing, and one that takes time."""

from __future__ import annotations

import time

from nightschool_server.app import App, ToolContext, tool


@tool(effect="read_only")
def nap(ms: int) -> str:
    """Take so long."""
    time.sleep(ms / 1000)
    return "woke"


@tool(effect="read_only")
def look(number: int) -> int:
    """Give the number back."""
    return number


@tool(effect="workspace")
def keep(number: int, context: ToolContext) -> int:
    """Keep the number."""
    context.state["number"] = number
    return number


app = App("nothing", "Do nothing.", [look, keep, nap])
