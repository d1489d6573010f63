"""What the profiles come to, and what a configuration changes of them."""

from __future__ import annotations

import pytest
from nightschool_learner.profiles import hyperparameters
from nightschool_server.config.config import Config, apply_overrides, dump_json
from nightschool_server.config.training import TrainConfig
from nightschool_server.errors import ConfigError

LAYERS = ("q_proj", "k_proj", "v_proj")


def test_profiles_say_what_the_card_and_the_paper_say() -> None:
    card, paper = hyperparameters(TrainConfig()), hyperparameters(TrainConfig(profile="paper"))
    assert (card.rank, card.alpha, card.target_modules) == (64, 16.0, ())
    assert (card.learning_rate, card.epochs, card.nll_weight, card.anchor_weight) == (5e-5, 2, 0.2, 0.3)
    assert (paper.rank, paper.target_modules) == (32, LAYERS)
    assert (paper.learning_rate, paper.scheduler, paper.max_length) == (1e-6, "cosine", 10_240)
    assert (paper.epochs, paper.nll_weight, paper.anchor_weight, paper.loss) == (1, 0, 0, "sigmoid")


def test_a_setting_wins_over_the_profile_also_where_it_is_zero() -> None:
    config = TrainConfig(profile="paper", rank=8, alpha=4, target_modules=("o_proj",), learning_rate=1e-4, epochs=3)
    own = hyperparameters(config)
    assert (own.rank, own.alpha, own.target_modules, own.learning_rate, own.epochs) == (8, 4, ("o_proj",), 1e-4, 3)
    assert hyperparameters(TrainConfig(nll_weight=0, anchor_weight=0)).nll_weight == 0


def test_a_cycle_may_choose_another_profile() -> None:
    served = Config.model_validate_json(dump_json(Config()))
    cycle = apply_overrides(served, ["learner.train.profile=paper", "learner.train.epochs=2"])
    told = hyperparameters(cycle.learner.train)
    assert (told.rank, told.learning_rate, told.epochs) == (32, 1e-6, 2)


def test_every_setting_of_a_run_reaches_it() -> None:
    config = TrainConfig(
        loss="robust", label_smoothing=0.1, beta=0.3, scheduler="linear", dropout=0.1, weight_decay=0.2, patience=7,
        gradient_checkpointing="on", max_length=512, num_looks=9, validation_share=0.3, checkpoint_steps=3,
    )  # fmt: skip
    told = hyperparameters(config).model_dump()
    given = config.model_dump()
    assert {name: given[name] for name in config.model_fields_set} == {
        name: told[name] for name in config.model_fields_set
    }


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["loss=robust"], "'robust' wants label_smoothing"),
        (["loss=ipo", "label_smoothing=0.1"], "'ipo' has no label_smoothing"),
        (["loss=dpo"], "loss = 'dpo'"),
        (["learning_rate=0"], "learning_rate = 0"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(settings: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        apply_overrides(Config(), [f"learner.train.{setting}" for setting in settings])
