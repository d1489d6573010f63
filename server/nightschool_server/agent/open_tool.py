"""A tool that can be called now, wherever it runs: what the toolbox is filled with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import ToolSpec
from nightschool_server.tools.effects import Effect
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolOutcome

RunCall = Callable[[dict[str, Any], ToolState, float], Awaitable[ToolOutcome]]
"""Runs a tool with checked arguments for at most so many seconds; an error is an outcome, only cancellation raises."""


@dataclass(frozen=True)
class OpenTool:
    """A tool that can be called now."""

    spec: ToolSpec
    effect: Effect
    where: str
    """Where it was declared, for messages to the application's author."""
    closed: bool
    """Whether arguments that the schema does not name are refused, where it does not say itself."""
    timeout_s: float
    """What one call may take."""
    run: RunCall
    simulate: RunCall | None = None
    """Answers in practice in place of an external tool."""
