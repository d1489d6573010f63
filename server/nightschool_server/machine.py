"""What this machine has that placement and `nightschool doctor` go by: cores, memory, GPUs. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Cores, memory, GPUs."""

    num_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    """That CUDA can use."""
    has_mps: bool = False
    """Apple's GPU, which shares the memory."""


def this_machine() -> Machine:
    """The machine that this process runs on, with the GPUs that CUDA_VISIBLE_DEVICES leaves it."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(str(one.name), int(one.total_memory)) for one in found)
    has_mps = torch.backends.mps.is_available()
    return Machine(psutil.cpu_count() or 1, psutil.virtual_memory().total, gpus, has_mps)
