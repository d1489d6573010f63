"""The trainer's device and its share of memory, with real trainer processes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Manifest, Placing, RunFolder
from nightschool_learner.trainer_device import placement_of, told_of_its_share
from nightschool_server.machine import Gpu, Machine
from nightschool_server.placement import Placement

from tests.learner.training_data import make_run, run_trainer

GPU = Gpu("card", 80 * 2**30)


def placed_run(folder: Path, placing: Placing) -> Manifest:
    manifest = make_run(folder, num_text=6, num_pictures=0, epochs=1).model_copy(update={"placing": placing})
    (manifest.output / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def test_a_share_that_is_too_small_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    share = 300 * 2**20 / psutil.virtual_memory().total
    done = run_trainer(placed_run(tmp_path, Placing(placement="split", engine_device="cpu", memory_fraction=share)))
    assert done.returncode == 2, done.stderr
    assert "raise learner.train.memory_fraction" in done.stderr
    assert RunFolder(tmp_path / "train").read_result() is None


def test_a_share_that_is_large_enough_changes_nothing(tmp_path: Path) -> None:
    manifest = placed_run(
        tmp_path, Placing(placement="split", engine_device="cpu", memory_fraction=0.5, engine_memory_fraction=0.5)
    )
    done = run_trainer(manifest)
    assert done.returncode == 0, done.stderr
    result = RunFolder(manifest.output).read_result()
    assert result is not None
    assert result.num_steps > 0


def test_a_device_that_is_not_there_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    done = run_trainer(placed_run(tmp_path, Placing(placement="separate", device="cuda:7", engine_device="cpu")))
    assert done.returncode == 2, done.stderr
    assert "learner.train.device is 'cuda:7'" in done.stderr


def test_a_fetched_run_has_the_best_device_of_its_host() -> None:
    placing = Placing(placement="remote", engine_device="cuda")
    assert placement_of(placing, Machine(8, 2**36, (GPU, GPU))) == Placement("separate", "cuda:1", 0.0)
    assert placement_of(placing, Machine(8, 2**36)) == Placement("separate", "cpu", 0.0)


def test_only_a_lack_of_memory_is_told_as_one() -> None:
    with pytest.raises(StageFailedError, match="does not fit"), told_of_its_share(Placing()):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(RuntimeError, match="shape"), told_of_its_share(Placing()):
        raise RuntimeError("shape mismatch")
