"""The named ways to train, and what of them a configuration leaves as it is.

`card` is the adapter that was released (rank 64, alpha 16, every linear layer), trained as this project trains by
default. `paper` is SPORT's text (arXiv 2504.21561): rank 32 on q, k and v, DPO alone, learning rate 1e-6 falling as a
cosine, one pass over a round's pairs; it leaves alpha and beta open. A setting that is given wins over the profile's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nightschool_server.config.training import TrainConfig

from nightschool_learner.manifest import Hyperparameters


@dataclass(frozen=True)
class Profile:
    """What a profile says where the configuration says nothing."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Empty: every linear layer of the text tower but the head."""
    learning_rate: float
    epochs: int
    nll_weight: float
    anchor_weight: float
    scheduler: str = "cosine"
    max_length: int = 10_240


PROFILES = {
    "card": Profile(64, 16.0, (), learning_rate=5e-5, epochs=2, nll_weight=0.2, anchor_weight=0.3),
    "paper": Profile(
        32, 32.0, ("q_proj", "k_proj", "v_proj"), learning_rate=1e-6, epochs=1, nll_weight=0.0, anchor_weight=0.0
    ),
}


def hyperparameters(config: TrainConfig) -> Hyperparameters:
    """The profile, with what the configuration says instead."""
    profile = PROFILES[config.profile]
    named = Hyperparameters.model_fields.keys()
    given: dict[str, Any] = {name: value for name, value in config.model_dump().items() if name in named}
    own = {name: value for name, value in given.items() if value is not None and not _is_unset(name, value)}
    return Hyperparameters.model_validate({name: getattr(profile, name) for name in _OF_PROFILES} | own)


_OF_PROFILES = tuple(Profile.__dataclass_fields__)


def _is_unset(name: str, value: Any) -> bool:
    """Rank, alpha and layers have no zero to set: there it means the profile's."""
    return name in ("rank", "alpha", "target_modules") and not value
