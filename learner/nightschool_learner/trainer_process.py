"""The trainer as a child process: started in a group of its own, watched, held, ended, never two at once.

Owns the child's life. The pid of the child is written beside the run, with its start time: a learner that was
killed leaves a trainer that ends by itself within a second (`trainer.py` watches its parent), and the next
learner ends it at once where it is surely that one, never by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass

import psutil

from nightschool_learner.manifest import RunFolder, write_whole

STOP_S = 5.0
"""How long a child may take to end after SIGTERM."""


@dataclass(frozen=True)
class TrainerProcess:
    """A trainer that runs."""

    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        """Of the child, which is also its process group."""
        return self.process.pid

    async def wait(self) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        return await self.process.wait()

    def hold(self) -> None:
        """Take the processor from the child until `go_on`; it keeps its memory."""
        _signal_group(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Give a held child the processor back."""
        _signal_group(self.pid, signal.SIGCONT)

    async def stop(self) -> None:
        """End the child and whatever it started: SIGTERM, and SIGKILL after a while. Waits for the end."""
        if self.process.returncode is not None:
            return
        _signal_group(self.pid, signal.SIGTERM)
        self.go_on()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            _signal_group(self.pid, signal.SIGKILL)
            await self.process.wait()


async def start_trainer(folder: RunFolder) -> TrainerProcess:
    """Start the trainer of a run folder; stdout and stderr are appended to its log.

    It leads a group of processes, so that a terminal's signals do not reach it and it can be held and ended with
    what it starts. It stays in the session, so that its niceness counts (`niceness.py`) and so that the kernel wakes it
    up (SIGHUP, SIGCONT) where it is held as its learner dies: then it ends by itself.
    """
    with folder.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nightschool_learner.trainer", str(folder.manifest),
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
        )  # fmt: skip
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).create_time()
        write_whole(folder.child, json.dumps({"pid": process.pid, "started": started}))
    return TrainerProcess(process)


def end_stale_trainer(folder: RunFolder) -> bool:
    """End a trainer that an earlier learner left on this folder. Returns whether there was one.

    A pid alone proves nothing, it may be another process by now: start time and command line must fit, too.
    """
    try:
        record = json.loads(folder.child.read_bytes())
        process = psutil.Process(record["pid"])
        is_ours = abs(process.create_time() - record["started"]) < 0.01 and str(folder.manifest) in process.cmdline()
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return False
    if not is_ours:
        return False
    _signal_group(process.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
        process.wait(STOP_S)
    return True


def last_words(folder: RunFolder, num_lines: int = 3) -> str:
    """The end of the trainer's log, for an error message."""
    if not folder.log.exists():
        return "it wrote nothing"
    lines = folder.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-num_lines:]) or "it wrote nothing"


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the group that the child leads; one that is gone is no fault."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
