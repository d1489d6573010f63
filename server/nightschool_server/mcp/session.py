"""A session with an MCP server for as long as its tools are open: started again when the server ends.

Owns when a server is started anew and what a call's failure is called; one run of it is `connection.py`. A server that
ends costs the calls in flight, but for those that may be made again, and the next call starts it; one that ends time
and again is left alone for longer and longer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import mcp_types as types
from mcp import MCPError
from pydantic import ValidationError

from nightschool_server.errors import AppError
from nightschool_server.mcp.connection import Connection, ServerEndedError
from nightschool_server.mcp.server import McpServer
from nightschool_server.tools.workers import ToolFailure

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0


class CallFailedError(Exception):
    """A call that gave no result; the message is what the model is told."""

    def __init__(self, failure: ToolFailure, message: str) -> None:
        super().__init__(message)
        self.failure: ToolFailure = failure


class McpSession:
    """The server's tools, callable."""

    def __init__(self, server: McpServer, connection: Connection) -> None:
        self.server = server
        self.tools = connection.tools
        """As listed at the start; what the server changes later is not offered."""
        self._connection = connection
        self._repeating = asyncio.Lock()
        self._restarting: asyncio.Task[Connection] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._num_restarts = 0
        """In a row, without a call that came through."""
        self._not_before = 0.0
        self._closed = False

    @classmethod
    async def start(cls, server: McpServer) -> McpSession:
        """Connect and list. Raises AppError."""
        return cls(server, await Connection.open(server))

    async def call(
        self, name: str, arguments: dict[str, Any], timeout_s: float, *, repeat: bool = False
    ) -> types.CallToolResult:
        """What the tool gave back. Raises CallFailedError; cancelling tells the server and returns at once.

        `timeout_s` counts from when the server runs. `repeat`: where the server ends over the call, it is made once
        more within as long again, one such call at a time. Whoever ends the server ends it again; the others, which
        were beside it or come behind it, do not pay for it: in practice they would be taken for candidates that failed.
        """
        try:
            connection = await self._connected(max_wait_s=FIRST_PAUSE_S if repeat else 0.0)
            return await self._call(connection, name, arguments, timeout_s)
        except ServerEndedError as error:
            if not repeat:
                raise self._execution(str(error)) from None
            ended = self._execution(str(error))
        ends_at = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._repeating.acquire()
        except TimeoutError:
            raise ended from None
        try:
            connection = await self._connected(max_wait_s=ends_at - time.monotonic())
            return await self._call(connection, name, arguments, max(0.0, ends_at - time.monotonic()))
        except ServerEndedError as error:
            raise self._execution(str(error)) from None
        finally:
            self._repeating.release()

    async def close(self) -> None:
        """End the server. Idempotent."""
        self._closed = True
        for task in (self._checking, self._restarting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._connection.close("was closed")

    async def _call(
        self, connection: Connection, name: str, arguments: dict[str, Any], timeout_s: float
    ) -> types.CallToolResult:
        """The call on one run of the server. Raises ServerEndedError too."""
        try:
            result = await connection.call(name, arguments, timeout_s)
        except TimeoutError:
            self._check(connection)
            raise CallFailedError("timeout", f"the tool did not end within {timeout_s:g} s and was cancelled") from None
        except MCPError as error:
            failure: ToolFailure = "schema" if error.code == types.INVALID_PARAMS else "execution"
            raise CallFailedError(failure, error.message) from None
        except (RuntimeError, ValidationError) as error:  # The SDK holds a result to the schemas of tool and protocol.
            raise self._execution(f"gave a result that breaks its own rules: {error}") from None
        self._num_restarts = 0
        return result

    async def _connected(self, *, max_wait_s: float = 0.0) -> Connection:
        """A run of the server that answers; one that may not begin yet is waited for so long."""
        wait_s = self._not_before - time.monotonic() if self._num_restarts else 0.0
        if not self._connection.is_open and self._restarting is None and 0 < wait_s <= max_wait_s:
            await asyncio.sleep(wait_s)
            wait_s = 0.0
        if self._closed:
            raise self._execution("is closed")
        if self._connection.is_open:
            return self._connection
        if self._restarting is None:
            if wait_s > 0:
                raise self._execution(f"ended again after its start; it is started anew in {wait_s:.1f} s")
            self._restarting = asyncio.create_task(self._restart())
        try:
            # Shared by all who wait: one that is cancelled must not cancel the others'.
            return await asyncio.shield(self._restarting)
        except AppError as error:
            logger.warning("mcp_server=%s event=not_restarted error=%s", self.server.name, error)
            raise self._execution("ended and cannot be started again") from None

    async def _restart(self) -> Connection:
        self._num_restarts += 1
        try:
            await self._connection.close("was restarted")
            logger.warning("mcp_server=%s event=restarting times=%d", self.server.name, self._num_restarts)
            self._connection = await Connection.open(self.server)
        finally:
            self._not_before = time.monotonic() + min(FIRST_PAUSE_S * 2 ** (self._num_restarts - 1), MAX_PAUSE_S)
            self._restarting = None
        if self._connection.tools != self.tools:
            logger.warning("mcp_server=%s event=tools_changed remedy=restart_nightschool", self.server.name)
        return self._connection

    def _check(self, connection: Connection) -> None:
        """After a call that took too long: end the server unless it answers, beside whatever else goes on."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._end_unless_it_answers(connection))

    async def _end_unless_it_answers(self, connection: Connection) -> None:
        if connection.is_open and not await connection.answers():
            logger.warning("mcp_server=%s event=hangs", self.server.name)
            await connection.close("did not answer any more and was ended")

    def _execution(self, what: str) -> CallFailedError:
        return CallFailedError("execution", f"the MCP server {self.server.name!r} {what}")
