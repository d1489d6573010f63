"""`McpServer`: what an application says of an MCP server whose tools it offers.

Owns the declaration and its checks. Light, because tool workers import the application: the sessions are `session.py`,
and the `mcp` library is imported there alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from nightschool_server.chat import ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.tools.effects import EFFECTS, Effect
from nightschool_server.tools.tool import Tool

MAX_TIMEOUT_S = 3600.0

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class McpServer:
    """A server of tools: a child process (`command`) or a streamable HTTP endpoint (`url`). Raises AppError.

    `${NAME}` in the values of `env` and `headers` stands for an environment variable of the process that opens the
    session, so that no secret is written into a module.
    """

    name: str
    """What logs and messages call it; letters, digits, `_` and `-`."""
    _: KW_ONLY
    command: Sequence[str] = ()
    """The program and its arguments, which speaks MCP on its standard input and output."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Beside PATH, HOME, USER, LOGNAME, SHELL and TERM, which alone are passed on."""
    cwd: str | Path | None = None
    """Of the child process; the current folder by default."""
    url: str = ""
    """The endpoint of a server that is reached over HTTP."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every HTTP request."""
    prefix: str | None = None
    """Tools are called `prefix.tool`; the server's name by default, bare names where it is empty."""
    include: Sequence[str] | None = None
    """The server's tools that are offered, by its own names; all by default."""
    exclude: Sequence[str] = ()
    """Tools that are not offered."""
    effects: Mapping[str, Effect] = field(default_factory=dict)
    """What a tool's call changes, by the server's own names, where its annotations do not say so."""
    simulate: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions that answer in practice in place of external tools, by the server's own names; same arguments."""
    strict: bool = False
    """Whether the arguments of its tools' calls are held to their schemas while they are sampled."""
    timeout_s: float | None = None
    """Of one call; None takes the application's `tool_timeout_s`."""
    start_timeout_s: float = 30.0
    """From the start of a session to the list of tools."""
    where: str = field(default="", repr=False)
    """File and line of the declaration, for messages; found by itself."""

    def __post_init__(self) -> None:
        if not self.where:
            # Two frames up: this method and the generated __init__.
            caller = sys._getframe(2)
            object.__setattr__(self, "where", f"{caller.f_code.co_filename}:{caller.f_lineno}")
        if not _NAME.fullmatch(self.name):
            self._refuse(f"its name must match {_NAME.pattern}: rename it")
        if isinstance(self.command, str):
            self._refuse(f"command is text: write a list, e.g. {self.command.split()!r}")
        if bool(self.command) == bool(self.url):
            self._refuse("give it either a command or a url")
        if self.url and not self.url.startswith(("http://", "https://")):
            self._refuse(f"url is {self.url!r}; it must begin with http:// or https://")
        if self.url and (self.env or self.cwd is not None):
            self._refuse("env and cwd are of a child process: leave them out beside a url")
        if self.command and self.headers:
            self._refuse("headers are of a url: leave them out beside a command")
        if self.prefix is not None and self.prefix and not _NAME.fullmatch(self.prefix):
            self._refuse(f"prefix is {self.prefix!r}; it must be empty or match {_NAME.pattern}")
        self._check_values()

    def _check_values(self) -> None:
        for tool, effect in self.effects.items():
            if effect not in EFFECTS:
                self._refuse(f"effects[{tool!r}] is {effect!r}; it must be one of {', '.join(sorted(EFFECTS))}")
        for field_name in ("timeout_s", "start_timeout_s"):
            value = getattr(self, field_name)
            if value is not None and not 0 < value <= MAX_TIMEOUT_S:
                self._refuse(f"{field_name} is {value}; it must be above 0 and at most {MAX_TIMEOUT_S:g}")

    @property
    def label(self) -> str:
        """Name and place, for messages to the application's author."""
        return f"MCP server {self.name!r} ({self.where})"

    def tool_name(self, name: str) -> str:
        """The name by which the model calls the server's tool `name`; characters that no name may have become `_`."""
        prefix = self.name if self.prefix is None else self.prefix
        legal = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        return f"{prefix}.{legal}" if prefix else legal

    @property
    def simulators(self) -> tuple[Tool, ...]:
        """The functions of `simulate` as a tool worker runs them."""
        return tuple(
            Tool(ToolSpec(self.tool_name(name), "", "{}"), function, "external", simulate=function)
            for name, function in self.simulate.items()
        )

    def expanded(self, values: Mapping[str, str]) -> dict[str, str]:
        """`values` with the environment's in place of `${NAME}`. Raises AppError for a variable that is not set."""

        def value_of(match: re.Match[str]) -> str:
            if match[1] not in os.environ:
                self._refuse(f"the environment variable {match[1]} is not set: set it where the server is started")
            return os.environ[match[1]]

        return {name: _VARIABLE.sub(value_of, value) for name, value in values.items()}

    def _refuse(self, fault: str) -> NoReturn:
        raise AppError(f"{self.label}: {fault}")
