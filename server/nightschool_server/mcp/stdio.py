"""The way to an MCP server that is a child process: its pipes as the SDK's streams, its end in words.

Owns the process (behind `guardian.py`), the lines of JSON on its standard input and output, and its stderr, which goes
to the log. The SDK's own transport does the first two; it neither tells how a server ended nor outlives our own death.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import mcp_types as types
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage

from nightschool_server.mcp.server import McpServer

logger = logging.getLogger(__name__)

GUARDIAN = Path(__file__).with_name("guardian.py")
GRACE_S = 2.0
"""How long a server may take to end by itself once its input has closed."""
KILL_S = 5.0
"""How long the guardian may take to end it otherwise."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer message ends the session."""
_CHUNK_BYTES = 2**18
_MAX_LOGGED_CHARS = 2000

Incoming = SessionMessage | Exception
Lifeline = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Streams = tuple[MemoryObjectReceiveStream[Incoming], MemoryObjectSendStream[SessionMessage]]


@dataclass
class StdioTransport:
    """One run of a server's process."""

    server: McpServer
    ended: str = ""
    """How the process ended, e.g. `exit code 1`; empty while it runs."""
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    """Its last lines."""
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    hangs: bool = False
    """Whether it is known that the server will not end by itself."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Streams]:
        """The SDK's streams to the process, which is gone when the block has ended. Raises OSError, AppError."""
        process, lifeline = await self._spawn()
        to_us, incoming = anyio.create_memory_object_stream[Incoming](0)
        outgoing, from_us = anyio.create_memory_object_stream[SessionMessage](0)
        work = (self._follow(lifeline), self._follow_stderr(process))
        tasks = [asyncio.create_task(each) for each in (*work, _read(process, to_us), _write(process, from_us, to_us))]
        try:
            yield incoming, outgoing
        finally:
            # A task of its own, which a cancelled caller cannot interrupt: no process may stay.
            ending = asyncio.create_task(self._end(process, lifeline, tasks))
            for stream in (to_us, incoming, outgoing, from_us):
                stream.close()
            await asyncio.shield(ending)

    async def _spawn(self) -> tuple[asyncio.subprocess.Process, Lifeline]:
        server, pipe = self.server, asyncio.subprocess.PIPE
        environment = get_default_environment() | server.expanded(server.env)
        ours, theirs = socket.socketpair()
        with theirs:
            lifeline = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", str(GUARDIAN), str(theirs.fileno()), *server.command),
                    stdin=pipe,
                    stdout=pipe,
                    stderr=pipe,
                    env=environment,
                    cwd=server.cwd,
                    pass_fds=(theirs.fileno(),),
                )
            except BaseException:
                lifeline[1].close()
                raise
        return process, lifeline

    async def _follow(self, lifeline: Lifeline) -> None:
        """Wait for the guardian's last word."""
        reader, writer = lifeline
        try:
            self.ended = (await reader.read()).decode() or "its guardian died"
            self.exited.set()
        finally:
            writer.close()

    async def _follow_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in _lines(process.stderr):
            text = line.decode(errors="replace").rstrip()[:_MAX_LOGGED_CHARS]
            self.stderr.append(text)
            logger.debug("mcp_server=%s stderr=%r", self.server.name, text)

    async def _end(
        self, process: asyncio.subprocess.Process, lifeline: Lifeline, tasks: list[asyncio.Task[None]]
    ) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(0 if self.hangs else GRACE_S):
                await self.exited.wait()
        except TimeoutError:
            lifeline[1].write_eof()
            await self._killed(process)
        await process.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _killed(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(KILL_S):
                await self.exited.wait()
        except TimeoutError:
            logger.warning("mcp_server=%s event=not_ended pid=%d", self.server.name, process.pid)
            process.kill()  # Its child dies with it.


async def _read(process: asyncio.subprocess.Process, to_us: MemoryObjectSendStream[Incoming]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with to_us:  # Closing it tells the session that the server is gone.
            async for line in _lines(process.stdout):
                try:
                    message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError as error:
                    await to_us.send(error)
                else:
                    await to_us.send(SessionMessage(message))


async def _write(
    process: asyncio.subprocess.Process,
    from_us: MemoryObjectReceiveStream[SessionMessage],
    to_us: MemoryObjectSendStream[Incoming],
) -> None:
    assert process.stdin is not None
    try:
        async with from_us:
            async for sent in from_us:
                line = sent.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(line.encode() + b"\n")
                await process.stdin.drain()
    except ConnectionError:
        to_us.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines that a process writes, however long; ends where it closes its end or a line is out of bounds."""
    pending: list[bytes] = []
    size = 0
    while chunk := await reader.read(_CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        pending.append(first)
        size += len(first)
        for following in others:
            yield b"".join(pending)
            pending, size = [following], len(following)
        if size > MAX_LINE_BYTES:
            return
