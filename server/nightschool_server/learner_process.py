"""The learner as a process of the server's own: started, started again when it dies, stopped on drain.

Serving never depends on it. The child side (`python -m nightschool_server.learner_process PARENT ...`) runs
`python -m nightschool_learner` in the same process beside a thread that ends it when the server is gone: a
SIGKILLed server leaves no learner behind, on any system.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
SETTLED_S = 60.0
"""A learner that ran this long starts again at once, without the backoff of those before."""

STOP_S = 10.0
PARENT_POLL_S = 0.5
USER_MISTAKE = 2
"""Exit code of a learner that cannot start as configured: starting it again would not help."""


class LearnerProcess:
    """Keeps one learner running. `on_exit` is told why one ended, in one sentence for operators."""

    def __init__(self, home: Path, environment: Mapping[str, str], on_exit: Callable[[str], None]) -> None:
        """`environment` is added to this process's own: the settings of the command line."""
        self._home = home
        self._environment = environment
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the learner that runs now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Begin to keep a learner running."""
        self._task = asyncio.create_task(self._keep_running(), name="learner_process")

    async def stop(self) -> None:
        """End the learner: SIGTERM, and SIGKILL after a while."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        if self.pid is None or self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            log.warning("event=learner_killed pid=%d reason=did_not_stop_in_%gs", self._process.pid, STOP_S)
            self._process.kill()
            await self._process.wait()

    async def _keep_running(self) -> None:
        backoff = MIN_BACKOFF_S / 2
        while True:
            started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(os.getpid()), "--home", str(self._home)),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **self._environment},
            )
            log.info("event=learner_started pid=%d", self._process.pid)
            code = await self._process.wait()
            log.warning("event=learner_ended pid=%d exit_code=%d", self._process.pid, code)
            if code == USER_MISTAKE:
                self._on_exit("the learner cannot start as configured: see the server's log, then restart the server")
                return
            backoff = MIN_BACKOFF_S if time.monotonic() - started > SETTLED_S else min(backoff * 2, MAX_BACKOFF_S)
            self._on_exit(f"the learner ended with exit code {code}; it starts again in {backoff:g} s")
            await asyncio.sleep(backoff)


def _end_with(parent_pid: int) -> None:
    """Ends this process when `parent_pid` is no longer its parent: politely first, then surely."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(1)


def _main() -> None:
    parent_pid = int(sys.argv.pop(1))
    threading.Thread(target=_end_with, args=(parent_pid,), daemon=True, name="parent_watch").start()
    runpy.run_module("nightschool_learner", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
