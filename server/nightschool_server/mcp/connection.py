"""One connection to an MCP server, from its handshake to its end, held by a task of its own.

The SDK's sessions must be entered and left in the same task, while calls come from many: that task is here. Owns one
run of a server; that there is another one after it is `session.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import mcp_types as types
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from nightschool_server.errors import AppError
from nightschool_server.mcp.server import McpServer
from nightschool_server.mcp.stdio import StdioTransport

logger = logging.getLogger(__name__)

MAX_PAGES = 100
"""Of a list of tools; a server that goes on is broken."""
PING_TIMEOUT_S = 2.0
LAST_WORD_S = 5.0
"""How long the end of a server's process is waited for, once its pipe has closed; on a busy machine it is slow to be
told."""


class ServerEndedError(Exception):
    """The server went away; the message says how."""


class Connection:
    """A server that answers. Make it with `open`, end it with `close`."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self.tools: tuple[types.Tool, ...] = ()
        """As the server listed them when the connection was made."""
        self._client: Client | None = None
        self._stdio = StdioTransport(server) if server.command else None
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._holder: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[types.CallToolResult]] = set()
        self._comparing: asyncio.Task[None] | None = None
        self._is_broken = False
        self._why_closed = ""

    @classmethod
    async def open(cls, server: McpServer) -> Connection:
        """Start the server or reach it, and list its tools. Raises AppError within `start_timeout_s`."""
        connection = cls(server)
        holder = connection._holder = asyncio.create_task(connection._hold(), name=f"mcp_{server.name}")
        ready = asyncio.create_task(connection._ready.wait())
        try:
            await asyncio.wait({holder, ready}, timeout=server.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise AppError(await connection._why_not_ready())
        except BaseException:
            await connection.close()
            raise
        finally:
            ready.cancel()
        return connection

    @property
    def is_open(self) -> bool:
        """Whether a call may succeed."""
        ended = self._stdio is not None and self._stdio.exited.is_set()
        return not (self._is_broken or ended or self._holder is None or self._holder.done())

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> types.CallToolResult:
        """The result of a call. Raises TimeoutError, ServerEndedError, and MCPError for what the server refuses.

        At the deadline, and when it is cancelled, the server is told and this returns at once.
        """
        assert self._client is not None
        call = asyncio.create_task(self._client.call_tool(name, arguments))
        self._calls.add(call)
        call.add_done_callback(self._forget)
        try:
            await asyncio.wait({call}, timeout=timeout_s)
        finally:
            # Its task tells the server that the call is off; waiting for that is waiting for a server that hangs.
            given_up = call.cancel()
        if given_up:
            raise TimeoutError
        try:
            return call.result()
        except MCPError as error:
            if error.code != types.CONNECTION_CLOSED and not self._is_lost(error):
                raise
        except asyncio.CancelledError:
            pass  # Not ours, which would have been raised above: the connection was closed over the call.
        self._is_broken = True
        raise ServerEndedError(await self._how_ended())

    async def answers(self) -> bool:
        """Whether the server still answers anything."""
        assert self._client is not None
        modern = self._client.protocol_version in MODERN_PROTOCOL_VERSIONS
        session = self._client.session
        asking = session.send_discover(self._client.protocol_version) if modern else session.send_ping()
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await asking
        except (TimeoutError, MCPError):
            if self._stdio is not None:
                self._stdio.hangs = True
            return False
        return True

    async def close(self, why: str = "was closed") -> None:
        """Leave the session; the server's process is gone afterwards, and calls in flight are told why. Idempotent."""
        self._is_broken = True
        self._why_closed = self._why_closed or why
        self._leave.set()
        assert self._holder is not None
        if not self._ready.is_set():
            self._holder.cancel()
        await asyncio.gather(self._holder, return_exceptions=True)
        left = [*self._calls, *([self._comparing] if self._comparing else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _forget(self, call: asyncio.Task[types.CallToolResult]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # Marks it as seen: a call that was given up has nobody else to see it.

    async def _hold(self) -> None:
        if self._stdio is not None:
            await self._serve(self._stdio.connect())
            return
        headers = self.server.expanded(self.server.headers)
        async with create_mcp_http_client(headers=headers) as http:
            await self._serve(streamable_http_client(self.server.url, http_client=http))

    async def _serve(self, transport: Any) -> None:
        async with Client(transport, message_handler=self._on_message, cache=None) as client:
            self._client = client
            self.tools = await self._list()
            self._ready.set()
            await self._leave.wait()

    async def _list(self) -> tuple[types.Tool, ...]:
        assert self._client is not None
        tools: list[types.Tool] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                return tuple(tools)
        raise AppError(f"{self.server.label}: its list of tools has more than {MAX_PAGES} pages")

    async def _on_message(self, message: object) -> None:
        name = self.server.name
        if isinstance(message, types.ToolListChangedNotification):
            if self._ready.is_set() and (self._comparing is None or self._comparing.done()):
                self._comparing = asyncio.create_task(self._compare())
        elif isinstance(message, Exception):
            logger.debug("mcp_server=%s unreadable=%r", name, message)
        elif isinstance(message, types.LoggingMessageNotification):
            logger.debug("mcp_server=%s level=%s said=%r", name, message.params.level, message.params.data)

    async def _compare(self) -> None:
        """Say so where the server offers other tools than at the start."""
        with contextlib.suppress(MCPError):
            if await self._list() != self.tools:
                logger.warning("mcp_server=%s event=tools_changed remedy=restart_nightschool", self.server.name)

    def _is_lost(self, error: MCPError) -> bool:
        # What the SDK makes of HTTP statuses that are not JSON-RPC: the session is not known to the server any more.
        return not self.server.command and error.message in ("Session terminated", "Server returned an error response")

    async def _how_ended(self) -> str:
        if self._why_closed:
            return self._why_closed
        if self._stdio is None:
            return "ended the session or cannot be reached"
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await self._stdio.exited.wait()
        except TimeoutError:
            return "closed its output"
        return f"ended ({self._stdio.ended})"

    async def _why_not_ready(self) -> str:
        label, holder = self.server.label, self._holder
        assert holder is not None
        if not holder.done():
            return f"{label} did not answer within {self.server.start_timeout_s:g} s (start_timeout_s)"
        error = holder.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, AppError):
            return str(error)
        if isinstance(error, ValidationError):
            return f"{label} did not start: what it says breaks the protocol: {error}"
        if self._stdio is not None and self._stdio.ended:
            said = "".join(f"\n  {line}" for line in self._stdio.stderr)
            return f"{label} did not start: it ended ({self._stdio.ended}){said}"
        where = self.server.url or " ".join(self.server.command)
        return f"{label} did not start: {where}: {type(error).__name__}: {error}"
