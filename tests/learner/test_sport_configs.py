"""The configurations for reproducing SPORT load, and say what METHOD.md says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from nightschool_learner.profiles import hyperparameters
from nightschool_server.config.config import Config, load_config
from nightschool_server.home import Home

SPORT = Path(__file__).resolve().parents[2] / "examples" / "sport"


def load(name: str, home: Path) -> Config:
    shutil.copy(SPORT / f"{name}.toml", home / "config.toml")
    return load_config(Home(home), environ={})


@pytest.mark.parametrize(("name", "rank", "alpha"), [("card", 64, 16), ("paper", 32, 32)])
def test_a_configuration_is_sports(name: str, rank: int, alpha: float, tmp_path: Path) -> None:
    config = load(name, tmp_path)
    explore, train = config.learner.explore, config.learner.train
    assert (explore.num_candidates, explore.cold_temperature, explore.hot_temperature) == (5, 0.7, 1.2)
    assert (explore.top_p, explore.max_tokens, explore.max_steps) == (0.8, 512, 8)
    assert (train.learning_rate, train.scheduler, train.max_length, train.nll_weight) == (1e-6, "cosine", 10_240, 0.0)
    assert (config.learner.synthesize.num_tasks, config.learner.synthesize.num_examples) == (500, 20)
    assert config.agent.action_format == "code"
    assert train.profile == name
    told = hyperparameters(train)
    assert (told.rank, told.alpha, told.loss, told.anchor_weight, told.validation_share) == (
        rank,
        alpha,
        "sigmoid",
        0,
        0,
    )
    assert config.engine.max_lora_rank >= rank


def test_the_two_differ_in_nothing_but_the_adapter(tmp_path: Path) -> None:
    card, paper = (load(name, tmp_path) for name in ("card", "paper"))
    assert card.engine.model_copy(update={"max_lora_rank": 32}) == paper.engine
    train = card.learner.train.model_copy(update={"profile": "paper"})
    assert card.learner.model_copy(update={"train": train}) == paper.learner
    assert (card.agent, card.server) == (paper.agent, paper.server)
