"""The trainer's device: taken before anything is put on it, within its share. Imports torch."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from nightschool_server.config.serving import EngineConfig
from nightschool_server.config.training import TrainConfig
from nightschool_server.errors import ConfigError
from nightschool_server.machine import Machine, this_machine
from nightschool_server.placement import Placement, place

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Placing
from nightschool_learner.trainer_life import is_launched

TorchDevice = Literal["cpu", "cuda", "mps"]


def placement_of(placing: Placing, machine: Machine) -> Placement:
    """Where a run goes on a machine. Raises StageFailedError where it cannot."""
    if placing.placement == "remote":
        # Nothing is served on this host: its best device is the trainer's.
        placing = placing.model_copy(update={"placement": "separate", "engine_device": "cpu"})
    train = TrainConfig(placement=placing.placement, device=placing.device, memory_fraction=placing.memory_fraction)
    engine = EngineConfig(device=placing.engine_device, memory_fraction=placing.engine_memory_fraction)
    try:
        return place(train, engine, machine)
    except ConfigError as error:
        raise StageFailedError(str(error)) from error


def place_trainer(placing: Placing) -> TorchDevice:
    """Take the device for this process, and no more of it than its share. Raises StageFailedError."""
    machine = this_machine()
    placement = placement_of(placing, machine)
    kind, _, number = placement.device.partition(":")
    if kind == "cuda" and is_launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif kind == "cuda":
        # Before CUDA is started in this process: the Trainer would spread itself over all that it sees.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number
    if placement.memory_fraction:
        _limit_memory(kind, placement.memory_fraction, machine)
    return "cuda" if kind == "cuda" else "mps" if kind == "mps" else "cpu"


@contextmanager
def told_of_its_share(placing: Placing) -> Iterator[None]:
    """Turn an allocation beyond the device's memory, or the share of it, into a sentence. Raises StageFailedError."""
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        # What says so needs memory, too.
        resource.setrlimit(resource.RLIMIT_DATA, (resource.getrlimit(resource.RLIMIT_DATA)[1],) * 2)
        raise StageFailedError(
            f"training does not fit its memory (placement {placing.placement!r}): raise learner.train.memory_fraction, "
            "lower learner.train.batch_size or max_length, or choose another placement; `nightschool doctor` lists them"
        ) from error


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a lack of memory; libraries wrap it in errors of their own."""
    if error is None:
        return False
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
    return is_one or _lacks_memory(error.__cause__ or error.__context__)


def _limit_memory(kind: str, fraction: float, machine: Machine) -> None:
    if kind == "cuda":
        torch.cuda.set_per_process_memory_fraction(fraction)
    elif kind == "mps":
        torch.mps.set_per_process_memory_fraction(fraction)
    else:
        # Private memory that can be written to; what is shared with other processes is not counted.
        limit = int(fraction * machine.memory_bytes)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
