"""What several modules of the learner's tests share: one real training run."""

from __future__ import annotations

import pytest

from tests.learner.training_data import LEARNS, Trained, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A first adapter: text and picture pairs mixed, from the base model."""
    return train(tmp_path_factory.mktemp("trained"), **LEARNS)
