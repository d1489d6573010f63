"""What several modules of the learner's tests share: one real training run, and the mark of a tool that never runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.learner.practice_app import ORDERED
from tests.learner.training_data import LEARNS, Trained, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A first adapter: text and picture pairs mixed, from the base model."""
    return train(tmp_path_factory.mktemp("trained"), **LEARNS)


@pytest.fixture
def ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tool `order` of `practice_app.py` leaves behind when it runs."""
    path = tmp_path / "ordered"
    monkeypatch.setenv(ORDERED, str(path))
    return path
