"""A run of several processes: its command, and two of them on this machine that train one adapter."""

from __future__ import annotations

import sys
from pathlib import Path

from nightschool_learner.trainer_life import launch_command

from tests.learner.training_data import finished, make_run, rewritten


def test_gpus_are_launched_by_accelerate_and_a_cpu_by_torch() -> None:
    on_gpus = launch_command(Path("/runs/1/manifest.json"), 4, on_gpus=True)
    assert " ".join(on_gpus) == (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision bf16 "
        "--dynamo_backend no --num_processes 4 -m nightschool_learner.trainer /runs/1/manifest.json"
    )
    on_cpu = launch_command(Path("/runs/1/manifest.json"), 2, on_gpus=False)
    assert " ".join(on_cpu) == (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 "
        "-m nightschool_learner.trainer /runs/1/manifest.json"
    )


def test_two_processes_train_one_adapter_on_batches_twice_as_large(tmp_path: Path) -> None:
    wanted = {"num_text": 12, "num_pictures": 4, "num_anchors": 6, "anchor_weight": 0.1, "validation_share": 0.25}
    wanted |= {"epochs": 2, "num_looks": 2, "rank": 8}
    alone = finished(make_run(tmp_path / "alone", batch_size=4, **wanted))
    manifest = make_run(tmp_path / "two", batch_size=2, **wanted)
    two = finished(rewritten(manifest, num_processes=2))
    assert two.result.num_steps == alone.result.num_steps == 6
    assert [row["step"] for row in two.folder.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert [look.step for look in two.result.looks] == [0, 3, 6]
    first, expected = two.result.looks[0], alone.result.looks[0]
    assert abs(first.loss - expected.loss) < 0.05
    assert two.result.metrics["rewards/margins"] > 0
    assert (two.result.adapter_folder / "provenance.json").exists()
