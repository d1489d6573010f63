"""Where training runs beside serving: the modes, whether a machine can run each, and what a trainer is given.

    separate   a device of its own: another GPU, or the CPU; callers see nothing
    split      the engine's device, in a fixed share of its memory; callers see a slower engine
    sleep      the engine's device while the engine sleeps; callers are told UNAVAILABLE and when to come back
    remote     another host; callers see nothing

Owns the decision and its reasons, for the trainer and for `nightschool doctor`. Pure: what the machine has is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nightschool_server.config.serving import EngineConfig
from nightschool_server.config.training import TrainConfig
from nightschool_server.errors import ConfigError
from nightschool_server.machine import Machine

Mode = Literal["separate", "split", "sleep", "remote"]
MODES: tuple[Mode, ...] = ("separate", "split", "sleep", "remote")

CPU = "cpu"


@dataclass(frozen=True)
class Placement:
    """Where a trainer runs."""

    mode: Mode
    device: str
    """`cpu`, `mps` or `cuda:N`; empty where another host decides."""
    memory_fraction: float
    """Of the device's memory that the trainer may have; 0 is no limit."""


@dataclass(frozen=True)
class Verdict:
    """Whether a machine can run a mode."""

    can_run: bool
    reason: str
    """Why not, or what it means here."""


def engine_device(engine: EngineConfig, machine: Machine) -> str:
    """The device that serves: `cpu`, `mps` or `cuda:0`."""
    if engine.device == "auto":
        return "cuda:0" if machine.gpus else "mps" if machine.has_mps else CPU
    return "cuda:0" if engine.device == "cuda" else engine.device


def place(train: TrainConfig, engine: EngineConfig, machine: Machine) -> Placement:
    """Where the trainer runs here. Raises ConfigError where the machine or the settings do not allow it."""
    serving = engine_device(engine, machine)
    if train.device.startswith("cuda") and int(train.device.partition(":")[2]) >= len(machine.gpus):
        raise ConfigError(f"learner.train.device is {train.device!r}, but there are {len(machine.gpus)} GPUs here")
    other = train.device or _other_device(serving, machine)
    mode = train.placement
    if mode == "auto":
        mode = "separate" if serving == CPU or other not in (serving, CPU) else "split"
    if mode == "separate":
        if other == serving != CPU:
            raise ConfigError(
                f"learner.train.device is {other!r}, the engine's, and placement is 'separate': name another one, or "
                "set learner.train.placement to split"
            )
        return Placement(mode, other, 0.0)
    if train.device and mode in ("split", "sleep") and train.device != serving:
        raise ConfigError(
            f"learner.train.device is {train.device!r}, but placement {mode!r} trains on the engine's, {serving}: "
            "leave it empty, or set learner.train.placement to separate"
        )
    if mode == "split":
        return Placement(mode, serving, split_fraction(train, engine))
    return Placement(mode, serving if mode == "sleep" else "", 0.0)


def split_fraction(train: TrainConfig, engine: EngineConfig) -> float:
    """The trainer's share of a device that it splits with the engine. Raises ConfigError where nothing is left."""
    left = round(1 - engine.memory_fraction, 6)
    share = train.memory_fraction or left
    if share > left or share <= 0:
        raise ConfigError(
            f"learner.train.memory_fraction {share:g} and engine.memory_fraction {engine.memory_fraction:g} are more "
            f"than the whole: lower one of them"
        )
    return share


def verdicts(train: TrainConfig, engine: EngineConfig, machine: Machine, kind: str) -> Mapping[Mode, Verdict]:
    """Every mode, by whether this machine can run it with an engine of `kind`."""
    return {mode: _verdict(mode, train, engine, machine, kind) for mode in MODES}


def _verdict(mode: Mode, train: TrainConfig, engine: EngineConfig, machine: Machine, kind: str) -> Verdict:
    try:
        placed = place(train.model_copy(update={"placement": mode}), engine, machine)
    except ConfigError as error:
        return Verdict(False, str(error))
    serving = engine_device(engine, machine)
    match mode:
        case "separate" if placed.device == serving:
            return Verdict(True, f"trains on the CPU's cores at niceness {train.nice}, in memory of its own")
        case "separate":
            return Verdict(True, f"trains on {placed.device} while {serving} serves")
        case "split":
            size = placed.memory_fraction * _memory_of(placed.device, machine) / 2**30
            return Verdict(True, f"trains in {placed.memory_fraction:.0%} of {serving}'s memory, {size:.1f} GiB")
        case "sleep" if kind != "vllm":
            return Verdict(False, f"only vLLM's engine can sleep{f', and here it is {kind}' if kind else ''}")
        case "sleep" if serving == CPU:
            return Verdict(True, "the engine ends and is started again; callers are told UNAVAILABLE meanwhile")
        case "sleep":
            return Verdict(True, "weights go to the host's memory; callers are told UNAVAILABLE meanwhile")
        case "remote":
            return Verdict(True, "`nightschool train` on another host fetches the run and sends the adapter")


def _other_device(serving: str, machine: Machine) -> str:
    """The best device that does not serve; the CPU where there is none."""
    free = [f"cuda:{index}" for index in range(len(machine.gpus)) if f"cuda:{index}" != serving]
    return free[-1] if free else CPU


def _memory_of(device: str, machine: Machine) -> int:
    if device.startswith("cuda"):
        return machine.gpus[int(device.partition(":")[2])].memory_bytes
    return machine.memory_bytes
