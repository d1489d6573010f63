"""Tools run here: a pool of worker processes that are spawned, never forked from the server.

Owns which worker runs which call, the workspace that it runs in, and what comes back as a `ToolOutcome`.
One worker is `worker.py`, its process `process.py`. A call never raises because of a tool.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from nightschool_server.errors import FailedPreconditionError
from nightschool_server.tools.returned import Contents, ReturnedFile, ReturnLimits, take_returned
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.worker import ToolWorker
from nightschool_server.uninterrupted import uninterrupted

logger = logging.getLogger(__name__)

ToolFailure = Literal["", "parse", "schema", "execution", "timeout", "unknown_tool", "refused"]
"""Why a call gave an error; "refused": practice may not run it, which is not the model's fault."""


@dataclass(frozen=True)
class CallLimits:
    """What one call of a tool is held to."""

    timeout_s: float = 30.0
    """Where neither the tool nor its application says otherwise."""
    max_output_chars: int = 16_000
    """Longer output is cut, with a mark."""
    max_memory_bytes: int = 0
    """What its process may take beside what its worker has. 0: no limit."""
    returned: ReturnLimits = field(default_factory=ReturnLimits)
    """Of the images and files that it gives back."""


DEFAULT_LIMITS = CallLimits()


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
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded images that the call gave back, by sha256, in their order; the model sees them."""
    simulated: bool = False
    """Whether a simulator answered in the tool's place."""
    files: tuple[ReturnedFile, ...] = ()
    """That the call gave back; the content has a line of each."""
    is_json: bool = False
    """Whether the content is a value as JSON, not text: code that calls the tool gets the value."""
    answer: str | None = None
    """The final answer, where the call ended the task."""


class ToolWorkers:
    """A pool of tool workers for one application. Make it with `start`, end it with `close`."""

    def __init__(self, app_ref: str, num_workers: int, limits: CallLimits) -> None:
        self._limits = limits
        self._workers = [_Seat(ToolWorker(app_ref, limits.max_memory_bytes)) for _ in range(num_workers)]
        # First in, first out: whoever has waited longest has forked for its next call, while the last one still does.
        self._idle: asyncio.Queue[_Seat] = asyncio.Queue()
        self._closed = False

    @classmethod
    async def start(cls, app_ref: str, num_workers: int = 2, *, limits: CallLimits = DEFAULT_LIMITS) -> ToolWorkers:
        """Spawn the workers and import the application in each. Raises AppError where that fails."""
        assert num_workers >= 1
        workers = cls(app_ref, num_workers, limits)
        # All are waited for, so that none is still starting when the others are stopped.
        starts = (worker.process.start() for worker in workers._workers)
        try:
            failed = [error for error in await asyncio.gather(*starts, return_exceptions=True) if error is not None]
            if failed:
                raise failed[0]
        except BaseException:
            await uninterrupted(workers.close())
            raise
        for worker in workers._workers:
            workers._idle.put_nowait(worker)
        return workers

    async def run(
        self,
        name: str,
        arguments: Mapping[str, Any],
        state: ToolState,
        timeout_s: float = DEFAULT_LIMITS.timeout_s,
        *,
        simulate: bool = False,
    ) -> ToolOutcome:
        """Call a tool, or its simulator, on `state`, whose workspace it may change; fork the state first to keep it.

        `timeout_s` counts from when a worker is free. Cancelling kills the tool and all that it started
        before the worker is used again.
        """
        call = {"name": name, "arguments": dict(arguments), "simulate": simulate}
        worker = await self._idle.get()
        started = time.perf_counter()
        try:
            self._check_open()
            reply, after, contents = await self._run(worker, call, state, timeout_s)
        finally:
            self._idle.put_nowait(worker)
        return _outcome(reply, after, contents, time.perf_counter() - started)

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
        self, worker: _Seat, call: dict[str, Any], state: ToolState, timeout_s: float
    ) -> tuple[dict[str, Any], ToolState, Contents]:
        workspace = state.workspace or worker.workspace(state)
        call |= {
            "state": state.data,
            "workspace": str(workspace),
            "max_output_chars": self._limits.max_output_chars,
        }
        try:
            reply = await worker.process.call(call, timeout_s)
            contents = _NOTHING
            if returned := reply.get("returned"):
                reply, contents = await self._taken(reply, returned, workspace, state.root)
        except BaseException:
            if state.workspace is None:
                shutil.rmtree(workspace, ignore_errors=True)
            raise
        return reply, worker.settle(workspace, state), contents

    async def _taken(
        self, reply: dict[str, Any], returned: list[dict[str, str]], workspace: Path, root: Path
    ) -> tuple[dict[str, Any], Contents]:
        """The images and files that a call gave back, and what the model reads of them."""
        try:
            # To its end: a cancelled call's workspace is removed, and no thread may write behind that.
            taking = asyncio.to_thread(take_returned, returned, workspace, root, self._limits.returned)
            contents = await uninterrupted(taking)
        except (ValueError, OSError) as fault:
            return {"failure": "execution", "content": f"error: {fault}"}, _NOTHING
        return {**reply, "content": contents.describe(reply["content"])}, contents


_NOTHING = Contents()


@dataclass
class _Seat:
    """A worker and the empty folder that it keeps for calls of tasks without files.

    Most calls write no file, and making a folder costs as much as the call: 1.4 ms on a busy disk.
    """

    process: ToolWorker
    spare: Path | None = None
    stopped: bool = False

    def workspace(self, state: ToolState) -> Path:
        """An empty folder under `state.root`."""
        spare, self.spare = self.spare, None
        if spare is not None:
            if spare.parent == state.root and spare.is_dir() and not spare.is_symlink():
                return spare
            shutil.rmtree(spare, ignore_errors=True)
        return state.make_workspace()

    def settle(self, workspace: Path, before: ToolState) -> ToolState:
        """The state `before` a call with the workspace that the call left; an empty new one is kept here."""
        if workspace.is_symlink() or not workspace.is_dir():  # Tools can do that; nothing must follow it.
            workspace.unlink(missing_ok=True)
            return replace(before, workspace=None)
        if before.workspace is None and not os.listdir(workspace):
            if self.stopped:  # Under this very call: nobody comes for the folder any more.
                workspace.rmdir()
            else:
                self.spare = workspace
            return before
        return replace(before, workspace=workspace)

    async def stop(self) -> None:
        """End the process and remove the folder."""
        self.stopped = True
        await self.process.stop()
        if self.spare is not None:
            shutil.rmtree(self.spare, ignore_errors=True)


def _outcome(reply: dict[str, Any], state: ToolState, contents: Contents, duration_s: float) -> ToolOutcome:
    failure = cast(ToolFailure, reply["failure"])
    if trace := reply.get("traceback"):
        logger.debug("tool=failed traceback=%r", trace)
    if "state" in reply:
        state = replace(state, data=_unicode(reply["state"]))
    return ToolOutcome(
        _unicode(reply["content"]),
        bool(failure),
        failure,
        state,
        duration_s,
        contents.images,
        files=contents.files,
        is_json=bool(reply.get("is_json")),
    )


def _unicode(text: str) -> str:
    """`text` without the lone surrogates that JSON may carry and neither protobuf nor SQLite takes."""
    return text.encode("utf-8", "replace").decode()
