"""The `[learner]` table of the configuration: its sections in one place, and the process's own settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nightschool_server.config.practice import (
    ExploreConfig,
    FaultInjectionConfig,
    PairsConfig,
    ScheduleConfig,
    SeedsConfig,
    SynthesizeConfig,
)
from nightschool_server.config.recipe import StagesConfig
from nightschool_server.config.roles import CriticConfig
from nightschool_server.config.screening import ScreenConfig
from nightschool_server.config.training import EvaluateConfig, GateConfig, PromoteConfig, TrainConfig
from nightschool_server.errors import ConfigError


class LearnerConfig(BaseModel):
    """How the learner practises, trains and proves."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether `nightschool serve` starts the learner."""
    poll_s: Annotated[float, Field(gt=0, le=60)] = 0.5
    """How often queued cycles, cancellations and pauses are looked for, seconds."""
    lease_s: Annotated[float, Field(ge=2)] = 15.0
    """A running cycle belongs to its learner for so long after its last sign of life, seconds."""
    server_wait_s: Annotated[float, Field(gt=0)] = 60.0
    """How long a call waits for a server that is away before the learner connects anew, seconds."""
    nice: Annotated[int, Field(ge=0, le=19)] = 5
    """Niceness of the learner and its tool workers: serving comes first."""
    recipe: str = "sport"
    """How a cycle learns: a shipped recipe (`sport`, `rest`, `checklist`) or a file. Beneath all other settings."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of all that a cycle draws; the one of another cycle, from its report, repeats it. 0: another one each time."""
    schedule: ScheduleConfig = ScheduleConfig()
    stages: StagesConfig = StagesConfig()
    seeds: SeedsConfig = SeedsConfig()
    screen: ScreenConfig = ScreenConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    explore: ExploreConfig = ExploreConfig()
    critic: CriticConfig = CriticConfig()
    pairs: PairsConfig = PairsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    promote: PromoteConfig = PromoteConfig()
    fault_injection: FaultInjectionConfig = FaultInjectionConfig()


def with_overrides(config: LearnerConfig, overrides: Sequence[str]) -> LearnerConfig:
    """`config` with a cycle's `key=value` overrides, e.g. `explore.num_candidates=3`; keys may begin with `learner.`.

    Raises ConfigError naming the override, its fault and the nearest key.
    """
    from nightschool_server.config.config import Config, apply_overrides  # config.py imports this module

    prefix = "learner."
    keyed = [prefix + override.strip().removeprefix(prefix) for override in overrides]
    if any(override.startswith("learner.fault_injection.allow") for override in keyed):
        raise ConfigError("fault_injection.allow is not for a cycle to set: set it where the server is started")
    return apply_overrides(Config(learner=config), keyed).learner
