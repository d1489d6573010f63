"""Who can do a stage: the implementations that ship, those that other packages declare, and any by its place.

A package declares one under the entry-point group `nightschool.stages`:

    [project.entry-points."nightschool.stages"]
    longest = "my_recipe:LongestPairs"

Each is something that can be called without arguments and gives a `stages.Stage`. `[learner.stages]` names them, which
a recipe does (`nightschool_server/config/recipe.py`). Owns the look-up alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points

from nightschool_server.config.recipe import StagesConfig
from nightschool_server.errors import ConfigError

from nightschool_learner.stages import STAGE_NAMES, Stage

GROUP = "nightschool.stages"

SHIPPED: Mapping[str, str] = {
    "seeds": "nightschool_learner.seeds:SeedsStage",
    "synthesize": "nightschool_learner.synthesize:SynthesizeStage",
    "explore": "nightschool_learner.explore:ExploreStage",
    "critique": "nightschool_learner.explore:CritiqueStage",
    "pairs": "nightschool_learner.pairs:PairsStage",
    "picks": "nightschool_learner.picks:picks_stage",
    "train": "nightschool_learner.train:TrainStage",
    "evaluate": "nightschool_learner.evaluate:EvaluateStage",
    "promote": "nightschool_learner.promote:PromoteStage",
}
"""By name. Imported when a cycle wants them: training and evaluation bring more than an idle learner needs."""


def implementations() -> dict[str, str]:
    """Where each known implementation is, by name. A declared one never takes the name of one that ships."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)} | dict(SHIPPED)


def stages_of(config: StagesConfig) -> tuple[Stage, ...]:
    """The stages of a cycle, in their order. Raises ConfigError that names the stage and what is known."""
    return tuple(_stage(name, getattr(config, name)) for name in STAGE_NAMES)


def _stage(slot: str, ref: str) -> Stage:
    known = implementations()
    place = ref if ":" in ref else known.get(ref)
    if place is None:
        raise ConfigError(
            f"learner.stages.{slot} = {ref!r}: no such implementation, known are {', '.join(sorted(known))}; install "
            f"the package that declares it under {GROUP!r}, or name it as module:attribute"
        )
    module, _, attribute = place.partition(":")
    try:
        stage: Stage = getattr(import_module(module), attribute)()
        name = stage.name
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"learner.stages.{slot} = {ref!r}: {place} gives no stage: {error}") from error
    if name != slot:
        raise ConfigError(f"learner.stages.{slot} = {ref!r}: {place} does the stage {name!r}, not {slot!r}")
    return stage
