"""That the pictures beside a cycle are drawn, whatever a run logged."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import pytest
from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.manifest import Look
from nightschool_learner.plots import plot_evaluation, plot_training
from PIL import Image

from tests.learner.training_data import Trained


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture that is whole and not blank."""
    image = Image.open(BytesIO(path.read_bytes())).convert("L")
    assert image.getextrema()[0] < 100
    return image.size


def evaluation(*, passed: bool, families: int) -> EvaluationRow:
    return EvaluationRow(
        id="eval_1", cycle_id="cycle_1", candidate="0002-bbbb", incumbent="0001-aaaa", set_digest="d", n=400,
        incumbent_success=0.6, candidate_success=0.875, interval_low=0.23, interval_high=0.32, interval_level=0.95,
        num_gained=120, num_lost=10, p_value=1e-22, passed=passed, reasons=("held: tasks",),
        families=[
            {"family": f"f{i}", "n": 50, "incumbent_success": 0.0, "candidate_success": 1.0} for i in range(families)
        ],
        set_version=1, protocol="p", detectable=0.07, rules=(), sampled=None, ability=None, judge=None, early_stop=None,
        notes=(), thresholds={},
    )  # fmt: skip


def test_training_curves_are_drawn_from_a_real_run(trained: Trained, tmp_path: Path) -> None:
    path = plot_training(trained.folder.read_metrics(), trained.result, tmp_path / "plots")
    assert path.name == "training.png"
    assert size_of(path)[0] > 800
    assert sorted(p.name for p in path.parent.iterdir()) == ["training.csv", "training.json", "training.png"]


def test_the_numbers_beside_the_picture_are_the_logged_ones_and_the_looks(trained: Trained, tmp_path: Path) -> None:
    logged = trained.folder.read_metrics()
    looks = tuple(
        Look(step=step, loss=1 - step / 40, margin=0.1, accuracy=1, anchor_nll=0.2, kl=0.01 * step, length_ratio=1.5)
        for step in (0, 15, 30)
    )
    result = trained.result.model_copy(update={"looks": looks, "kept_step": 15, "stopped": "step 30: why not"})
    plot_training(logged, result, tmp_path)
    with (tmp_path / "training.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == list(range(31))
    assert [float(row["loss"]) for row in table[1:]] == [row["loss"] for row in logged]
    assert {step: float(row["held_back/kl"]) for step, row in enumerate(table) if row["held_back/kl"]} == {
        0: 0.0, 15: 0.15, 30: 0.3,
    }  # fmt: skip
    told = json.loads((tmp_path / "training.json").read_text())
    assert (told["kept_step"], told["stopped"], told["alarms"]) == (15, "step 30: why not", [])
    assert told["steps"][15]["logps/chosen"] == logged[14]["logps/chosen"]
    assert told["steps"][15]["held_back/length_ratio"] == 1.5


def test_a_run_without_metrics_still_has_a_picture(trained: Trained, tmp_path: Path) -> None:
    assert size_of(plot_training([], trained.result, tmp_path))[1] > 300


@pytest.mark.parametrize(("passed", "families"), [(True, 9), (False, 1), (True, 0)])
def test_success_before_and_after_is_drawn_with_intervals(tmp_path: Path, passed: bool, families: int) -> None:
    path = plot_evaluation(evaluation(passed=passed, families=families), tmp_path)
    assert path.name == "evaluation.png"
    assert size_of(path)[0] > 400


def test_drawing_again_replaces_the_picture(tmp_path: Path) -> None:
    first = plot_evaluation(evaluation(passed=True, families=2), tmp_path).read_bytes()
    assert plot_evaluation(evaluation(passed=False, families=2), tmp_path).read_bytes() != first
