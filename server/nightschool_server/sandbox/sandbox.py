"""Runs steps of code that a model wrote, each in a process of its own that sees the task's workspace and nothing else.

Owns the order of a step (start, hand over, answer its tool calls, take its report, clean up), its limits in time and on
the disk, and what the end of a process means. The process is `process.py`, the workspace's shape `folder.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nightschool_server.config.code import CodeConfig
from nightschool_server.sandbox import folder
from nightschool_server.sandbox.frames import BrokenFrameError, visible
from nightschool_server.sandbox.process import SandboxProcess
from nightschool_server.uninterrupted import uninterrupted

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 64
WATCH_S = 0.1
"""How often the folders are measured while code runs."""
EXIT_S = 5.0
"""How long a process that has closed its socket may take to end: on a busy machine its end is slow to be told."""
MAX_LOST = 20
"""Variables that are named as not kept."""
MAX_UNSAFE_PROCESSES = 64
"""Beyond those that the user has, without a sandbox."""

Failure = str
"""'' | 'parse' | 'execution' | 'timeout', as in `ToolOutcome`."""


@dataclass(frozen=True)
class Function:
    """A tool as the code sees it."""

    function: str
    """Its name in Python."""
    tool: str
    parameters: tuple[str, ...]
    """In the order in which positions are taken."""


@dataclass(frozen=True)
class CodeStep:
    """One step to run."""

    code: str
    functions: Sequence[Function]
    variables: bytes
    """What the step before it kept; never read outside a sandbox."""
    workspace: Path
    max_output_chars: int


@dataclass(frozen=True)
class Reply:
    """What a call of a tool gives the code."""

    content: str
    is_error: bool
    is_json: bool


@dataclass(frozen=True)
class CodeResult:
    """What became of a step."""

    output: str = ""
    """What it printed, the first part where it was too much."""
    num_chars: int = 0
    """Of all that it printed."""
    failure: Failure = ""
    fault: str = ""
    answer: str | None = None
    """The final answer, where it gave one."""
    variables: bytes = b""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Variables that could not be kept, and why."""


CallTool = Callable[[str, Any], Awaitable[Reply | None]]
"""Runs a tool by its name with what the code gave as arguments, checked by nobody yet; None ends the code."""


class Sandbox:
    """Runs code under one configuration. Make it with `open_sandbox` of `proof.py`."""

    def __init__(self, config: CodeConfig, *, unsafe: bool = False) -> None:
        self.config = config
        self.unsafe = unsafe
        self._places = asyncio.Semaphore(config.num_processes)
        self._most = folder.Size(config.max_files, config.disk_bytes)

    async def run(self, step: CodeStep, call_tool: CallTool, max_s: float) -> CodeResult:
        """Run a step for at most `max_s` and the configured wall time, its tool calls not counted.

        Whatever the code does is a result; only cancellation and a sandbox that cannot start raise. Nothing of the
        step runs when this returns or raises, and its workspace is one that can be copied.
        """
        async with self._places:
            temporary = Path(tempfile.mkdtemp(prefix="code-", dir=step.workspace.parent))
            began = time.time()
            try:
                async with self._process(step.workspace, temporary) as process:
                    result = await self._converse(process, step, call_tool, min(max_s, self.config.timeout_s))
            finally:
                await uninterrupted(asyncio.to_thread(_clean, temporary, step.workspace, self._most, began))
        return result

    @contextlib.asynccontextmanager
    async def _process(self, workspace: Path, temporary: Path) -> AsyncIterator[SandboxProcess]:
        starting = asyncio.create_task(SandboxProcess.start(workspace, temporary, unsafe=self.unsafe))
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await uninterrupted(_end_started(starting))
            raise
        try:
            yield process
        finally:
            await uninterrupted(process.end())

    async def _converse(
        self, process: SandboxProcess, step: CodeStep, call_tool: CallTool, left_s: float
    ) -> CodeResult:
        process.send(self._job(step), step.variables)
        watch = asyncio.create_task(self._watch(process))
        most = self.config.variables_bytes
        try:
            while True:
                began = time.monotonic()
                async with asyncio.timeout(max(left_s, 0)):
                    frame = await process.receive(most)
                left_s -= time.monotonic() - began
                if frame is None:
                    return await self._ended(process, step, watch)
                value, payload = frame
                if "call" not in value:
                    return _reported(value, payload, step.max_output_chars)
                reply = await call_tool(str(value["call"]), value.get("arguments"))
                if reply is None:
                    return _killed(step, "execution", "the code went on calling tools beyond its limit and was killed")
                content = {"content": reply.content, "is_error": reply.is_error, "is_json": reply.is_json}
                process.send(content)
        except TimeoutError:
            return _killed(step, "timeout", "the code took too long and was killed")
        except BrokenFrameError as error:
            return _killed(step, "execution", f"the code wrote to its tools' connection and was killed: {error}")
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    def _job(self, step: CodeStep) -> dict[str, Any]:
        config = self.config
        limits = {
            "RLIMIT_AS": config.memory_bytes,
            "RLIMIT_CPU": config.cpu_s,
            "RLIMIT_FSIZE": config.disk_bytes // 4,
            "RLIMIT_NOFILE": MAX_OPEN_FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
        }
        if self.unsafe:  # In the sandbox there are no new processes at all.
            limits["RLIMIT_NPROC"] = _num_processes() + MAX_UNSAFE_PROCESSES
        return {
            "code": step.code,
            "tools": [
                {"function": f.function, "tool": f.tool, "parameters": list(f.parameters)} for f in step.functions
            ],
            "limits": {name: limit for name, limit in limits.items() if hasattr(resource, name)},
            "max_output_chars": step.max_output_chars,
            "max_variables_bytes": config.variables_bytes,
        }

    async def _watch(self, process: SandboxProcess) -> str:
        """Kill the process when its folders hold too much. Returns the limit."""
        while True:
            await asyncio.sleep(WATCH_S)
            size = folder.Size(0, 0)
            for place in process.folders:
                size += await asyncio.to_thread(folder.measure, place, self._most)
            if (fault := size.fault(self._most)) is not None:
                process.kill()
                return fault

    async def _ended(self, process: SandboxProcess, step: CodeStep, watch: asyncio.Task[str]) -> CodeResult:
        """The process ended before its step did."""
        if watch.done() and not watch.cancelled():
            return _killed(step, "execution", f"the code wrote {watch.result()} and was killed")
        try:
            async with asyncio.timeout(EXIT_S):
                code = await process.ended()
        except TimeoutError:
            return _killed(step, "execution", "the code closed its connection and was killed")
        if code == 128 + signal.SIGXCPU:
            fault = f"the code used more than {self.config.cpu_s} s of CPU time and was killed"
        elif code > 128 and code - 128 in list(signal.Signals):
            fault = f"the code's process ended with signal {signal.Signals(code - 128).name}"
        else:
            fault = f"the code's process ended with exit code {code}"
        return _killed(step, "execution", fault)


async def _end_started(starting: asyncio.Task[SandboxProcess]) -> None:
    with contextlib.suppress(Exception):
        await (await starting).end()


def _clean(temporary: Path, workspace: Path, most: folder.Size, began: float) -> None:
    folder.remove(temporary)
    if removed := folder.tidy(workspace, most, began):
        logger.info("event=workspace_tidied num_removed=%d", len(removed))


def _reported(value: Mapping[str, Any], payload: bytes, max_output_chars: int) -> CodeResult:
    """The report of a step, of which nothing is believed but its form."""
    output, fault, answer, lost = (value.get(key) for key in ("output", "fault", "answer", "lost"))
    num_chars, failure = value.get("num_chars"), value.get("failure")
    output = output if isinstance(output, str) else ""
    return CodeResult(
        output=visible(output[:max_output_chars]),
        num_chars=num_chars if isinstance(num_chars, int) and num_chars >= len(output) else len(output),
        failure=failure if failure in ("", "parse", "execution") else "execution",
        fault=visible(fault[:max_output_chars]) if isinstance(fault, str) else "",
        answer=visible(answer[:max_output_chars]) if isinstance(answer, str) else None,
        variables=payload,
        lost=_short(lost) if isinstance(lost, dict) else {},
    )


def _short(lost: Mapping[str, Any]) -> dict[str, str]:
    return {visible(name[:100]): visible(str(why)[:300]) for name, why in list(lost.items())[:MAX_LOST]}


def _killed(step: CodeStep, failure: Failure, fault: str) -> CodeResult:
    """A step that gave no report: what it printed is gone, the variables are those from before it."""
    return CodeResult(failure=failure, fault=fault, variables=step.variables)


def _num_processes() -> int:
    """Processes and threads of this user, against which the kernel counts."""
    if sys.platform != "linux":
        return MAX_UNSAFE_PROCESSES
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                count += sum(1 for _ in (path / "task").iterdir())
    return count
