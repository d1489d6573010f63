"""The processes of one core of vLLM: EngineCore, which schedules, and on a CPU a worker below it.

Owns telling them, which core of the machine they run on, and their end: vLLM returns from its shutdown as soon as it
has sent SIGKILL, while a process keeps its memory, a GPU's or the host's, until the kernel has taken it back.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long what outlives vLLM's shutdown has before it is killed, seconds."""

GONE_S = 60.0
"""How long the kernel has to take the memory of a killed process back, seconds."""

_POLL_S = 0.02
_FEW_CORES = 4


@dataclass(frozen=True)
class CoreProcesses:
    """What a core started; told while it lives, because a worker whose EngineCore has died is below it no more."""

    cores: tuple[BaseProcess, ...]
    """EngineCore: this process's own child, which `multiprocessing` must reap."""
    workers: tuple[psutil.Process, ...]

    @classmethod
    def of(cls, core: Any) -> CoreProcesses:
        """Those of a started `AsyncLLM`."""
        cores = tuple(core.engine_core.resources.engine_manager.processes)
        return cls(cores, tuple(worker for process in cores for worker in _below(process)))

    def pin_to_worker(self) -> None:
        """On a machine of few cores, keep EngineCore on a core of the worker's.

        Both wait for each other in busy loops, so that two cores of two would be theirs and none the server's.
        """
        cores = psutil.cpu_count() or 1
        if cores > _FEW_CORES:
            return
        for worker in self.workers:
            if len(worker.cpu_affinity()) < cores:
                for process in self.cores:
                    psutil.Process(process.pid).cpu_affinity(worker.cpu_affinity())

    def end(self, core: Any, *, grace_s: float = GRACE_S) -> None:
        """Shut the core down and return once its processes are gone, with their memory. Blocks; takes seconds."""
        core.shutdown()
        if self._gone_within(grace_s):
            return
        for process in (*self.cores, *self.workers):
            _kill(process)
        if not self._gone_within(GONE_S):
            left = [process.pid for process in (*self.cores, *self.workers) if _lives(process)]
            log.error("event=engine_outlives_its_end pids=%s seconds=%g", left, GONE_S)

    def _gone_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while any(_lives(process) for process in (*self.cores, *self.workers)):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True


def is_engine(process: psutil.Process) -> bool:
    """Whether a process is one of vLLM's that lives."""
    try:
        return "VLLM::" in " ".join((process.name(), *process.cmdline()))
    except psutil.Error:
        return False


def _below(process: BaseProcess) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(process.pid).children(recursive=True) if is_engine(child)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: BaseProcess | psutil.Process) -> bool:
    """Whether a process has not ended; EngineCore is reaped once it has."""
    if isinstance(process, BaseProcess):
        return process.is_alive()
    try:
        # A zombie holds memory still while it has threads.
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False


def _kill(process: BaseProcess | psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
