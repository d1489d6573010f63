"""Every loss of pairs that can be configured: TRL computes it on our tokens, and it ranks the pairs right."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from nightschool_learner.trainer_methods import ExactDPOTrainer, make_trainer
from nightschool_learner.trainer_model import load_student
from nightschool_learner.trainer_rows import read_material
from nightschool_server.config.training import TrainConfig

from tests.learner.training_data import make_run

LOSSES = get_args(TrainConfig.model_fields["loss"].annotation)
AT_START = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "robust": math.log(2),
    "sigmoid_norm": math.log(2),
    "nca_pair": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 50.0,
}
"""Of a policy that is its reference, beta 0.1, worked out by hand."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> ExactDPOTrainer:
    """Four pairs, one batch; configured with a loss that has a parameter of its own."""
    manifest = make_run(
        tmp_path_factory.mktemp("run"), num_text=4, num_pictures=0, rank=8, nll_weight=0.0, loss="robust",
        label_smoothing=0.1,
    )  # fmt: skip
    student = load_student(manifest, "cpu")
    return make_trainer(student, read_material(manifest, student), manifest, [])


def test_the_configured_loss_and_its_parameter_reach_trl(trainer: ExactDPOTrainer) -> None:
    assert (trainer.loss_types, trainer.loss_weights, trainer.label_smoothing) == (["robust", "sft"], [1.0, 0.0], 0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_starts_where_its_formula_says_and_pulls_the_pairs_apart(loss: str, trainer: ExactDPOTrainer) -> None:
    """Discopop is not among them: at a margin of zero, where every run starts, its gradient pulls the wrong way."""
    trainer.loss_types, trainer.loss_weights = [loss], [1.0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    value = trainer.compute_loss(trainer.model, dict(batch))
    if loss in AT_START:
        assert value.item() == pytest.approx(AT_START[loss], rel=1e-4)
    trainer.model.zero_grad()
    value.backward()
    length = math.sqrt(sum(float(p.grad.square().sum()) for p in trained if p.grad is not None))
    with torch.no_grad():
        for parameter in trained:
            parameter.sub_(0.05 / length * parameter.grad)
        trainer._metrics["train"].clear()
        trainer.compute_loss(trainer.model, dict(batch))
        for parameter, value_before in zip(trained, before, strict=True):
            parameter.copy_(value_before)
    assert trainer._metrics["train"]["rewards/margins"][0] > 0.001
