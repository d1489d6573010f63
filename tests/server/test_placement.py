"""Where training runs: what each machine can, what `auto` chooses, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from nightschool_server.config.config import apply_overrides, load_config
from nightschool_server.config.serving import EngineConfig
from nightschool_server.config.training import TrainConfig
from nightschool_server.errors import ConfigError
from nightschool_server.home import Home
from nightschool_server.machine import Gpu, Machine, this_machine
from nightschool_server.placement import MODES, Placement, engine_device, place, verdicts

GPU = Gpu("card", 80 * 2**30)
NONE = Machine(8, 64 * 2**30)
ONE = Machine(8, 64 * 2**30, (GPU,))
TWO = Machine(8, 64 * 2**30, (GPU, GPU))
MAC = Machine(8, 64 * 2**30, has_mps=True)


def placed(machine: Machine, engine: dict[str, Any] | None = None, **train: Any) -> Placement:
    return place(TrainConfig(**train), EngineConfig(**(engine or {})), machine)


@pytest.mark.parametrize(
    ("machine", "engine", "expected"),
    [
        (NONE, {}, Placement("separate", "cpu", 0.0)),
        (ONE, {"memory_fraction": 0.6}, Placement("split", "cuda:0", 0.4)),
        (TWO, {}, Placement("separate", "cuda:1", 0.0)),
        (ONE, {"device": "cpu"}, Placement("separate", "cuda:0", 0.0)),
        (MAC, {"memory_fraction": 0.5}, Placement("split", "mps", 0.5)),
    ],
)
def test_auto_takes_a_device_of_its_own_where_there_is_one(
    machine: Machine, engine: dict[str, Any], expected: Placement
) -> None:
    assert placed(machine, engine) == expected


@pytest.mark.parametrize("machine", [NONE, ONE, TWO, MAC])
def test_auto_never_chooses_what_refuses_requests_or_needs_another_host(machine: Machine) -> None:
    assert placed(machine).mode in ("separate", "split")


def test_an_explicit_device_is_taken() -> None:
    assert placed(TWO, placement="separate", device="cpu") == Placement("separate", "cpu", 0.0)
    assert placed(ONE, placement="separate") == Placement("separate", "cpu", 0.0)
    assert placed(TWO, {"device": "cpu"}, device="cuda:0") == Placement("separate", "cuda:0", 0.0)


def test_sleep_trains_where_the_engine_was_and_remote_nowhere_here() -> None:
    assert placed(TWO, placement="sleep") == Placement("sleep", "cuda:0", 0.0)
    assert placed(ONE, placement="remote") == Placement("remote", "", 0.0)


@pytest.mark.parametrize(
    ("machine", "engine", "train", "said"),
    [
        (ONE, {}, {"device": "cuda:1"}, "there are 1 GPUs"),
        (ONE, {}, {"placement": "separate", "device": "cuda:0"}, "placement to split"),
        (TWO, {}, {"placement": "split", "device": "cuda:1"}, "placement to separate"),
        (ONE, {"memory_fraction": 0.8}, {"placement": "split", "memory_fraction": 0.3}, "more than the whole"),
        (ONE, {"memory_fraction": 1.0}, {"placement": "split"}, "more than the whole"),
    ],
)
def test_what_cannot_be_says_what_to_change(
    machine: Machine, engine: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(machine, engine, **train)


def test_shares_that_exceed_the_whole_are_refused_when_the_configuration_is_read(tmp_path: Any) -> None:
    config = load_config(Home(tmp_path), {}, {"engine.memory_fraction": "0.7"})
    with pytest.raises(ConfigError, match="more than the whole"):
        apply_overrides(config, ["learner.train.placement=split", "learner.train.memory_fraction=0.4"])
    assert apply_overrides(config, ["learner.train.placement=split"]).learner.train.placement == "split"


def test_verdicts_cover_every_mode_with_a_reason() -> None:
    for machine, kind in [(NONE, "transformers"), (NONE, "vllm"), (ONE, "vllm"), (TWO, "transformers")]:
        found = verdicts(TrainConfig(), EngineConfig(), machine, kind)
        assert list(found) == list(MODES)
        assert all(verdict.reason for verdict in found.values())
        assert found["sleep"].can_run == (kind == "vllm")
        assert found["remote"].can_run


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 2**30
    assert engine_device(EngineConfig(device="cpu"), machine) == "cpu"
