"""Tools run here: a pool of worker processes that are spawned, never forked from the server.

Owns the server's end: which worker runs which call, deadlines, cancellation, and what comes back as a
`ToolOutcome`. What happens inside a worker is `tool_process.py`. A call never raises because of a tool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self, cast

from nightschool_server.errors import AppError, FailedPreconditionError
from nightschool_server.tool_process import MAX_FRAME_BYTES, frame
from nightschool_server.tool_state import ToolState

logger = logging.getLogger(__name__)

ToolFailure = Literal["", "schema", "execution", "timeout", "unknown_tool", "refused"]
"""Why a call gave an error; "refused": practice may not run it, which is not the model's fault."""

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_OUTPUT_CHARS = 16_000
START_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 5.0
"""A worker that has not cleared a call away by then is killed itself."""


@dataclass(frozen=True)
class ToolOutcome:
    """What a call gave back."""

    content: str
    """The observation."""
    is_error: bool
    failure: ToolFailure
    state: ToolState
    """After the call; the one before it where the call failed, but for files written until then."""
    duration_s: float


class ToolWorkers:
    """A pool of tool workers for one application. Make it with `start`, end it with `close`."""

    def __init__(self, app_ref: str, num_workers: int, max_output_chars: int) -> None:
        self._app_ref = app_ref
        self._max_output_chars = max_output_chars
        self._workers = [_Worker(app_ref) for _ in range(num_workers)]
        # Last in, first out: a few callers keep to the few workers that are warm.
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._closed = False

    @classmethod
    async def start(
        cls, app_ref: str, num_workers: int = 2, *, max_output_chars: int = DEFAULT_MAX_OUTPUT_CHARS
    ) -> ToolWorkers:
        """Spawn the workers and import the application in each. Raises AppError where that fails."""
        assert num_workers >= 1
        workers = cls(app_ref, num_workers, max_output_chars)
        # All are waited for, so that none is still starting when the others are stopped.
        starts = (worker.start() for worker in workers._workers)
        failed = [error for error in await asyncio.gather(*starts, return_exceptions=True) if error is not None]
        if failed:
            await workers.close()
            raise failed[0]
        for worker in workers._workers:
            workers._idle.put_nowait(worker)
        return workers

    async def run(
        self, name: str, arguments: Mapping[str, Any], state: ToolState, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> ToolOutcome:
        """Call a tool on `state`, whose workspace it may change; fork the state first to keep it.

        `timeout_s` counts from when a worker is free. Cancelling kills the tool and all that it started
        before the worker is used again.
        """
        worker = await self._idle.get()
        started = time.perf_counter()
        try:
            self._check_open()
            reply, after = await self._run(worker, name, arguments, state, timeout_s)
        finally:
            self._idle.put_nowait(worker)
        return _outcome(reply, after, time.perf_counter() - started)

    async def close(self) -> None:
        """End every worker, with whatever it runs, and wait until they are gone."""
        self._closed = True
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPreconditionError("the tool workers are closed")

    async def _run(
        self, worker: _Worker, name: str, arguments: Mapping[str, Any], state: ToolState, timeout_s: float
    ) -> tuple[dict[str, Any], ToolState]:
        workspace = state.workspace or state.make_workspace()
        call = {
            "name": name,
            "arguments": dict(arguments),
            "state": state.data,
            "workspace": str(workspace),
            "max_output_chars": self._max_output_chars,
        }
        try:
            reply = await worker.call(call, timeout_s)
        except BaseException:
            if state.workspace is None:
                shutil.rmtree(workspace, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):
            if state.workspace is None:
                workspace.rmdir()  # Only an empty one goes.
                return reply, state
        return reply, replace(state, workspace=workspace)


class _Peer:
    """The server's end of the socket to a worker: frames out, frames in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, value: dict[str, Any]) -> None:
        """Put a frame on its way; one that a dead worker cannot take is dropped."""
        self._writer.write(frame(value))

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


class _Worker:
    """One worker process and the socket to it; started again on the next call after it died."""

    def __init__(self, app_ref: str) -> None:
        self._app_ref = app_ref
        self._process: asyncio.subprocess.Process | None = None
        self._peer: _Peer | None = None

    async def start(self) -> None:
        """Spawn the process and wait until it has imported the application. Raises AppError."""
        ours, theirs = socket.socketpair()
        try:
            self._peer = _Peer(*await asyncio.open_unix_connection(sock=ours))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nightschool_server.tool_process", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C in a terminal is for the server, which ends its workers in order.
                start_new_session=True,
            )
            theirs.close()
            self._peer.send({"app": self._app_ref, "path": _python_path()})
            async with asyncio.timeout(START_TIMEOUT_S):
                reply = await self._peer.receive()
        except TimeoutError:
            reply = {"error": f"app {self._app_ref!r} was not imported within {START_TIMEOUT_S:g} s"}
        except BaseException:
            await self.stop()
            raise
        finally:
            theirs.close()
        if reply is None or "error" in reply:
            await self.stop()
            raise AppError(reply["error"] if reply else f"app {self._app_ref!r}: importing it ended the tool worker")

    async def call(self, call: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to one call, whatever becomes of it. When it returns or raises, nothing of it runs."""
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
            await self._uninterrupted(self._clear(receiving))
            return _failed("timeout", f"the tool did not end within {timeout_s:g} s and was killed")
        except BaseException:
            await self._uninterrupted(self._clear(receiving))
            raise
        if reply is None:
            logger.warning("tool_worker=died tool=%s", call["name"])
            await self._uninterrupted(self.stop())
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _clear(self, receiving: asyncio.Task[dict[str, Any] | None]) -> None:
        """Have the worker kill its call, and wait until that is gone; failing that, end the worker."""
        if self._peer is not None:
            self._peer.send({"kill": True})
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                if await receiving is not None:
                    return
        except TimeoutError:
            logger.warning("tool_worker=stuck")
        await self.stop()

    @staticmethod
    async def _uninterrupted(cleaning: Coroutine[Any, Any, None]) -> None:
        """Wait for `cleaning` to its end; a cancellation that comes meanwhile is raised after it."""
        task = asyncio.create_task(cleaning)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


def _python_path() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]


def _failed(failure: ToolFailure, content: str) -> dict[str, Any]:
    return {"failure": failure, "content": f"error: {content}"}


def _outcome(reply: dict[str, Any], state: ToolState, duration_s: float) -> ToolOutcome:
    failure = cast(ToolFailure, reply["failure"])
    if trace := reply.get("traceback"):
        logger.debug("tool=failed traceback=%r", trace)
    if "state" in reply:
        state = replace(state, data=_unicode(reply["state"]))
    return ToolOutcome(_unicode(reply["content"]), bool(failure), failure, state, duration_s)


def _unicode(text: str) -> str:
    """`text` without the lone surrogates that JSON may carry and neither protobuf nor SQLite takes."""
    return text.encode("utf-8", "replace").decode()
