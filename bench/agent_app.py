"""An application for `bench/agent.py`: a function that takes time and changes nothing."""

from __future__ import annotations

import time

from nightschool_server.app import App, tool


@tool(effect="read_only")
def nap(ms: int) -> str:
    """Take so long."""
    time.sleep(ms / 1000)
    return "woke"


app = App("napping", "Nap.", [nap])
