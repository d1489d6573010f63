"""A server's processes from outside: their CPU seconds and memory, stopping and resuming them, their end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

SAMPLE_S = 0.25
FEW_CORES = 4
MB = 1e6


@dataclass
class Used:
    """By one tree of processes while a block ran."""

    seconds: float = 0.0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    others_cpu_s: float = 0.0
    peak_rss_mb: float = 0.0


def tree(pid: int) -> list[psutil.Process]:
    """The process and all below it, those that have ended left out."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pid: int) -> float:
    """CPU seconds of the tree's processes that live."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def rss_mb(pid: int) -> float:
    """Resident memory of the tree; pages that processes share are counted in each."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / MB


@asynccontextmanager
async def used(pid: int) -> AsyncIterator[Used]:
    """What the tree uses during the block; filled in at its end."""
    found = Used()

    async def sample() -> None:
        while True:
            found.peak_rss_mb = max(found.peak_rss_mb, rss_mb(pid))
            await asyncio.sleep(SAMPLE_S)

    sampler = asyncio.create_task(sample())
    began, server, client, machine = time.perf_counter(), cpu_s(pid), time.process_time(), _machine_cpu_s()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - began
        found.server_cpu_s, found.client_cpu_s = cpu_s(pid) - server, time.process_time() - client
        found.others_cpu_s = max(0.0, _machine_cpu_s() - machine - found.server_cpu_s - found.client_cpu_s)
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)


def pause(pid: int) -> None:
    """Stop the tree where it is: an idle server must not take the cores of the one that is measured."""
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            process.suspend()


def resume(pid: int) -> None:
    """Let the tree go on."""
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            process.resume()


def pin_engine_core(pid: int) -> None:
    """On few cores, keep vLLM's EngineCore on its worker's core, as nightschool does by itself (engine.pin_cores)."""
    cores = psutil.cpu_count() or 1
    if cores > FEW_CORES:
        return
    for core in _engines(tree(pid)):
        for worker in _engines(core.children()):
            if len(worker.cpu_affinity()) < cores:
                core.cpu_affinity(worker.cpu_affinity())


def end(pid: int, grace_s: float) -> None:
    """SIGTERM to the parent, SIGKILL to whatever of the tree is left after `grace_s`."""
    processes = tree(pid)
    if not processes:
        return
    resume(pid)
    with contextlib.suppress(psutil.Error):
        processes[0].terminate()
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _engines(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "VLLM::" in " ".join((process.name(), *process.cmdline())):
                yield process


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)
