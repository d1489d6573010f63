"""A child process of the benchmarks: its command, its lines, its end; see `sides.py` for what runs in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from bench import tree

ROOT = Path(__file__).resolve().parents[1]
START_S = 600.0
GRACE_S = 30.0
ANSWER_S = 900.0


class Process:
    """A child process whose lines can be waited for."""

    def __init__(self, command: list[str], *, stdin: bool = False, env: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.began = time.perf_counter()
        self._child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment() | (env or {}),
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    async def line(self, text: str, after: int = 0, timeout_s: float = START_S) -> float:
        """Wait for a line of stderr with `text`, from line `after` on. Returns the seconds since the start."""
        ends = time.perf_counter() + timeout_s
        while not any(text in line for line in self.lines[after:]):
            self.check(f"the line {text!r}", ends)
            await asyncio.sleep(0.02)
        return time.perf_counter() - self.began

    def check(self, what: str, ends: float) -> None:
        """Raises RuntimeError with the last lines where the process has ended or the time has."""
        if self._child.poll() is not None or time.perf_counter() > ends:
            raise RuntimeError(f"no {what} of {self._child.args!r}:\n" + "".join(self.lines[-30:]))

    async def exchange(self, line: str | None) -> Any:
        """Send a line, if one is given, and read one of JSON."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if line is not None:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        answer = await asyncio.wait_for(asyncio.to_thread(self._child.stdout.readline), ANSWER_S)
        if not answer:
            raise RuntimeError("the child has ended:\n" + "".join(self.lines[-30:]))
        return json.loads(answer)

    async def end(self) -> None:
        """End it and all below it."""
        if self._child.stdin is not None:
            # The child ends by itself, and its engine with it.
            tree.resume(self.pid)
            self._child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._child.wait, GRACE_S)
        await asyncio.to_thread(tree.end, self.pid, GRACE_S)
        self._child.wait(GRACE_S)

    def _read(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self.lines.append(line)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTSCHOOL_")}
    path = ":".join([str(ROOT), *(str(ROOT / part) for part in ("server", "client", "learner", "proto"))])
    own = {"PYTHONPATH": f"{path}:{kept.get('PYTHONPATH', '')}", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return {**kept, **own, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
