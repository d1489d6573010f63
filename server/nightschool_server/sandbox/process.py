"""One sandboxed process from the server's side: started, spoken to over a socket, and ended with all that is in it.

Owns descriptors, the kill, and that nothing is left when `end` returns. What the process sees is `bubblewrap.py`'s,
what it may call `seccomp.py`'s, what it runs `program.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nightschool_server.sandbox import bubblewrap, frames, seccomp

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0


class SandboxProcess:
    """A process that waits for a step of code."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        folders: tuple[Path, Path],
        *,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.folders = folders
        """Those that it may write to."""
        self._process = process
        self._reader = reader
        self._writer = writer
        self._inside: int | None = None
        """A descriptor of the first process of the sandbox's own table of processes: when it ends, all of them do."""

    @classmethod
    async def start(cls, workspace: Path, temporary: Path, *, unsafe: bool) -> SandboxProcess:
        """Start it on its two writable folders. Raises FailedPreconditionError where bubblewrap cannot be used.

        `unsafe` leaves the sandbox out: an ordinary process of the server's user, in a session of its own.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(theirs.close)
            stack.callback(ours.close)
            if unsafe:
                process = await _start_bare(workspace, temporary, theirs)
                info = None
            else:
                process, info = await _start_sandboxed(workspace, temporary, theirs)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            started = cls(process, (workspace, temporary), reader=reader, writer=writer)
            stack.pop_all()
            theirs.close()
        try:
            if info is not None:
                started._inside = await _first_process(info)
        except BaseException:
            await started.end()
            raise
        return started

    def send(self, value: Mapping[str, Any], payload: bytes = b"") -> None:
        """Put a frame on its way; one that a dead process cannot take is dropped."""
        self._writer.write(frames.encode(value, payload))

    async def receive(self, max_payload_bytes: int) -> frames.Frame | None:
        """The next frame; None where the process has closed its end. Raises BrokenFrameError."""
        return await frames.read(self._reader, max_payload_bytes)

    def kill(self) -> None:
        """Kill everything in the sandbox."""
        with contextlib.suppress(ProcessLookupError):
            if self._inside is not None:
                signal.pidfd_send_signal(self._inside, signal.SIGKILL)
            elif self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the end. The exit code; 128 and more: ended by a signal of that number less 128."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def end(self) -> None:
        """Kill it, and wait until all of it is gone. Idempotent."""
        self.kill()
        # bubblewrap ends when it has reaped the first process, which the kernel ends behind all others.
        await self._process.wait()
        if self._inside is not None:
            os.close(self._inside)
            self._inside = None
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def _start_sandboxed(
    workspace: Path, temporary: Path, theirs: socket.socket
) -> tuple[asyncio.subprocess.Process, int]:
    """bubblewrap, and a descriptor on which it tells of its child."""
    program = seccomp.program()
    with contextlib.ExitStack() as stack:
        info, info_end, filter_, filter_end = (*os.pipe(), *os.pipe())
        for descriptor in (info_end, filter_):
            stack.callback(os.close, descriptor)
        os.write(filter_end, program)  # A few KiB: less than a pipe holds.
        os.close(filter_end)
        close_info = stack.enter_context(contextlib.ExitStack())
        close_info.callback(os.close, info)
        descriptors = bubblewrap.Descriptors(theirs.fileno(), info_end, filter_)
        process = await asyncio.create_subprocess_exec(
            *bubblewrap.command(workspace, temporary, descriptors),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), info_end, filter_),
            env={},
            start_new_session=True,
        )
        close_info.pop_all()
    return process, info


async def _start_bare(workspace: Path, temporary: Path, theirs: socket.socket) -> asyncio.subprocess.Process:
    program = Path(__file__).with_name("program.py")
    return await asyncio.create_subprocess_exec(
        *bubblewrap.python(str(program), theirs.fileno()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(theirs.fileno(),),
        env={**bubblewrap.ENVIRONMENT, "HOME": str(workspace), "TMPDIR": str(temporary)},
        cwd=workspace,
        start_new_session=True,
    )


async def _first_process(info: int) -> int | None:
    """A descriptor of the sandbox's first process, from what bubblewrap says on `info`; None where it failed."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    file = os.fdopen(info, "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            told = await reader.read()
        # It cannot be gone and its number given away: it waits for its step.
        return os.pidfd_open(int(json.loads(told)["child-pid"]))
    except (ValueError, KeyError, ProcessLookupError):
        return None
    finally:
        transport.close()
