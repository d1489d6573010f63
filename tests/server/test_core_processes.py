"""The end of a core's processes, with processes that do as vLLM's do: slow to go, or not willing to."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
from nightschool_server.engines.on_vllm.processes import CoreProcesses

HELD_BYTES = 2**28
"""What the kernel must take back before a process is gone; it takes long enough to be seen."""


@dataclass(frozen=True)
class Core:
    """The part of `AsyncLLM` that ends."""

    shutdown: Callable[[], None]


def hold(told: Connection) -> None:
    """A process with memory and a worker below it; neither goes for SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = bytearray(HELD_BYTES)
    worker = psutil.Popen(["sleep", "1000"])
    told.send(worker.pid)
    told.recv()
    held.clear()


@contextmanager
def holding() -> Generator[tuple[BaseProcess, psutil.Process], None, None]:
    """The process and its worker."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(theirs,))
    process.start()
    worker = psutil.Process(ours.recv())
    try:
        yield process, worker
    finally:
        process.kill()
        process.join()
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # Reaped between the two questions.
        return True


def test_the_end_returns_once_what_was_killed_is_gone() -> None:
    with holding() as (process, worker):
        seen = psutil.Process(process.pid)

        def shutdown() -> None:
            """As vLLM's, which does not wait for what it kills."""
            worker.kill()
            process.kill()

        CoreProcesses((process,), (worker,)).end(Core(shutdown))
        assert not seen.is_running(), "not even a zombie is left of a child"
        assert gone(worker)


def test_what_outlives_the_shutdown_is_killed_a_worker_without_its_core_too() -> None:
    with holding() as (process, worker):
        CoreProcesses((process,), (worker,)).end(Core(process.terminate), grace_s=0.2)
        assert not process.is_alive()
        assert gone(worker)


def test_the_end_of_what_has_ended_is_nothing() -> None:
    with holding() as (process, worker):
        process.kill()
        process.join()
        worker.kill()
        CoreProcesses((process,), (worker,)).end(Core(process.terminate))
        assert gone(worker)
