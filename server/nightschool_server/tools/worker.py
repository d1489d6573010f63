"""One tool worker from the server's side: its process, the socket to it, deadlines and cancellation.

Whatever becomes of a call, nothing of it runs when `ToolWorker.call` returns or raises. What happens at the
other end is `process.py`; which worker runs which call is `workers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from typing import Any, cast

from nightschool_server.errors import AppError
from nightschool_server.tools.process import KILL, MAX_FRAME_BYTES, frame
from nightschool_server.uninterrupted import uninterrupted

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 5.0
"""A worker that has not cleared a call away by then is killed itself."""


class _Peer:
    """The server's end of the socket to a worker: frames out, frames in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, value: dict[str, Any]) -> None:
        """Put a value on its way; one that a dead worker cannot take is dropped."""
        self.send_frame(frame(value))

    def send_frame(self, whole: bytes) -> None:
        """The same of a value that is a frame already."""
        self._writer.write(whole)

    async def receive(self) -> dict[str, Any] | None:
        """The next frame; None where the worker is gone or writes what is not one."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > MAX_FRAME_BYTES:
                return None
            return cast(dict[str, Any], json.loads(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            return None

    async def close(self) -> None:
        """Close the socket and give its descriptor back."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class ToolWorker:
    """One worker process and the socket to it; started again on the next call after it died."""

    def __init__(self, app_ref: str, max_memory_bytes: int = 0) -> None:
        """`max_memory_bytes` bounds what a call may take; 0 does not."""
        self._app_ref = app_ref
        self._max_memory_bytes = max_memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._peer: _Peer | None = None

    async def start(self) -> None:
        """Spawn the process and wait until it has imported the application. Raises AppError."""
        ours, theirs = socket.socketpair()
        try:
            self._peer = _Peer(*await asyncio.open_unix_connection(sock=ours))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nightschool_server.tools.process", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            self._peer.send({"app": self._app_ref, "path": _python_path(), "max_memory_bytes": self._max_memory_bytes})
            async with asyncio.timeout(START_TIMEOUT_S):
                reply = await self._peer.receive()
        except TimeoutError:
            reply = {"error": f"app {self._app_ref!r} was not imported within {START_TIMEOUT_S:g} s"}
        except BaseException:
            await uninterrupted(self.stop())
            raise
        finally:
            theirs.close()
        if reply is None or "error" in reply:
            await self.stop()
            raise AppError(reply["error"] if reply else f"app {self._app_ref!r}: importing it ended the tool worker")

    async def call(self, call: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to one call, `{"failure", "content", "state"?, "traceback"?}`. Raises only cancellation."""
        if self._process is None:
            try:
                await self.start()
            except AppError as error:
                return _failed("execution", f"the tool worker does not start: {error}")
        assert self._peer is not None
        self._peer.send(call)
        # A task of its own, since a cancelled read would lose its place between two frames.
        receiving = asyncio.create_task(self._peer.receive())
        try:
            async with asyncio.timeout(timeout_s):
                reply = await asyncio.shield(receiving)
        except TimeoutError:
            await uninterrupted(self._clear(receiving))
            return _failed("timeout", f"the tool did not end within {timeout_s:.3g} s and was killed")
        except BaseException:
            await uninterrupted(self._clear(receiving))
            raise
        if reply is None:
            logger.warning("tool_worker=died tool=%s", call["name"])
            await uninterrupted(self.stop())
            return _failed("execution", "the tool worker died")
        return reply

    async def stop(self) -> None:
        """End the process with what it runs, and wait until it is gone. Idempotent."""
        process, self._process = self._process, None
        peer, self._peer = self._peer, None
        if peer is not None:
            await peer.close()  # The worker kills its call and ends when it sees this.
        if process is None:
            return
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
            await process.wait()

    async def _clear(self, receiving: asyncio.Task[dict[str, Any] | None]) -> None:
        """Have the worker kill its call, and wait until that is gone; failing that, end the worker."""
        if self._peer is not None:
            self._peer.send_frame(KILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                if await receiving is not None:
                    return
        except TimeoutError:
            logger.warning("tool_worker=stuck")
        await self.stop()


def _python_path() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]


def _failed(failure: str, content: str) -> dict[str, Any]:
    return {"failure": failure, "content": f"error: {content}"}
