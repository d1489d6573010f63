"""Recipes: files that say how a night of learning is cooked, as settings beneath those of `config.toml`.

A recipe is TOML with tables of `[learner]` alone: `[learner.stages]` names an implementation for each stage, the others
hold its settings. `learner.recipe` names a shipped one (`recipes/NAME.toml` beside this module) or a file. Owns their
reading; what a stage's name means is the learner's (`registry.py`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nightschool_server.errors import ConfigError

SHIPPED = Path(__file__).parent / "recipes"
OF_THE_PROCESS = (
    "enabled",
    "recipe",
    "poll_s",
    "lease_s",
    "server_wait_s",
    "nice",
    "seed",
    "schedule",
    "fault_injection",
)
"""Of `[learner]`: settings of the process and of one installation, not of a way to learn."""


class StagesConfig(BaseModel):
    """Who does each stage: the name of an implementation, or `module:attribute`; see `docs/recipes.md`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seeds: str = "seeds"
    """Chooses the requests that are learned from."""
    synthesize: str = "synthesize"
    """Writes tasks from them."""
    explore: str = "explore"
    """Practises the tasks and has candidates compared."""
    critique: str = "critique"
    """Closes the account of comparisons, and holds the critic against its floors."""
    pairs: str = "pairs"
    """Makes what is trained on of what was practised."""
    train: str = "train"
    """Trains a candidate and has the server take it in."""
    evaluate: str = "evaluate"
    """Measures candidate and incumbent on held-out tasks."""
    promote: str = "promote"
    """Decides, and ends the cycle."""


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the server."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def read_recipe(ref: str) -> dict[str, Any]:
    """A recipe's tables, as `config.toml` would hold them. Raises ConfigError."""
    path = SHIPPED / f"{ref}.toml" if ref in shipped_recipes() else Path(ref).expanduser()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"learner.recipe = {ref!r}: neither one of {', '.join(shipped_recipes())} nor a file that can be read "
            f"from {Path.cwd()}: {error}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    own = tables.get("learner", {})
    foreign = [
        *(key for key in tables if key != "learner"),
        *(f"learner.{key}" for key in OF_THE_PROCESS if isinstance(own, dict) and key in own),
        *(["learner"] if not isinstance(own, dict) else []),
    ]
    if foreign:
        raise ConfigError(
            f"recipe {path} sets {foreign[0]!r}: a recipe holds tables of [learner] that say "
            "how to learn; the rest belongs into config.toml"
        )
    return tables
