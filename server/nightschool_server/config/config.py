"""Every setting, resolved: defaults < the recipe < config.toml < environment < command line.

    [server]                            config.toml in the home folder
    port = 50051
    NIGHTSCHOOL__SERVER__PORT=50051     the environment, read here and nowhere else
    --set server.port=50051             the command line

Owns the order of the sources, the refusal of unknown keys with the nearest right one, and the text forms of a
resolved configuration. The sections are in `serving.py` and `learner.py`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nightschool_server.config.learner import LearnerConfig
from nightschool_server.config.recipe import read_recipe
from nightschool_server.config.serving import (
    AdaptersConfig,
    AgentConfig,
    EngineConfig,
    LogConfig,
    ServerConfig,
    SessionsConfig,
)
from nightschool_server.errors import ConfigError
from nightschool_server.home import Home
from nightschool_server.placement import split_fraction

ENVIRONMENT_PREFIX = "NIGHTSCHOOL__"
RECIPE = "learner.recipe"


class Config(BaseModel):
    """The whole configuration, one section for each component."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    sessions: SessionsConfig = SessionsConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    agent: AgentConfig = AgentConfig()
    learner: LearnerConfig = LearnerConfig()

    @model_validator(mode="after")
    def _split_fits(self) -> Self:
        if self.learner.train.placement == "split":
            try:
                split_fraction(self.learner.train, self.engine)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @property
    def app(self) -> str:
        """The application as `module:attribute`."""
        return self.agent.app


@dataclass(frozen=True)
class Setting:
    """One key of the configuration, for documentation and help."""

    key: str
    default: Any
    description: str

    def row(self) -> str:
        """As a line of the table in `docs/configuration.md`."""
        default = json.dumps(self.default, ensure_ascii=False)
        return f"| `{self.key}` | `{default}` | {self.description} |"


@dataclass(frozen=True)
class _Given:
    """A value that someone set, and where."""

    value: Any
    origin: str


def load_config(
    home: Home, environ: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> Config:
    """The configuration of `home`. `overrides` are the command line's `section.key` to text.

    Raises ConfigError naming the key, its value, where it was set, and the rule or the nearest known key.
    """
    given = _from_toml(home)
    for name, text in (os.environ if environ is None else environ).items():
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            given[key] = _Given(_parsed(key, text, f"environment variable {name}"), f"environment variable {name}")
    for key, text in (overrides or {}).items():
        given[key] = _Given(_parsed(key, text, "command line"), "command line")
    return _resolved({}, {**_from_recipe(given.get(RECIPE)), **given})


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.key=value` overrides, e.g. those of one cycle. Raises ConfigError.

    A recipe among them takes the place of the one before: what that one set and nobody else changed is undone.
    """
    texts = split_overrides(overrides)
    given = {key: _Given(_parsed(key, text, "override"), "override") for key, text in texts.items()}
    values = config.model_dump()
    if RECIPE in given:
        _undo_recipe(values, config.learner.recipe)
        given = {**_from_recipe(given[RECIPE]), **given}
    return _resolved(values, given)


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """`["server.port=0"]` as `{"server.port": "0"}`. Raises ConfigError for one without `=`."""
    pairs: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. server.port=0")
        pairs[key.strip()] = text.strip()
    return pairs


def to_environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """The command line's overrides as environment variables, for a child process."""
    return {ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): text for key, text in overrides.items()}


def settings() -> Iterator[Setting]:
    """Every key with its default and meaning, in order."""
    yield from _settings(Config, "")


def dump_json(config: Config) -> str:
    """The resolved configuration as JSON; `Config.model_validate_json` reads it."""
    return config.model_dump_json(indent=2)


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` reads it."""
    return "\n".join(_toml_lines(config.model_dump(mode="json"), "")).strip() + "\n"


def _from_toml(home: Home) -> dict[str, _Given]:
    try:
        text = home.config.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{home.config} is not TOML: {error}") from error
    given: dict[str, _Given] = {}
    _flatten(tables, "", str(home.config), given)
    return given


def _from_recipe(named: _Given | None) -> dict[str, _Given]:
    """What the recipe sets; the default one where none is named."""
    ref = Config().learner.recipe if named is None else str(named.value)
    given: dict[str, _Given] = {}
    _flatten(read_recipe(ref), "", f"recipe {ref}", given)
    return given


def _undo_recipe(values: dict[str, Any], ref: str) -> None:
    """Put back to their defaults the values that the recipe `ref` set and nothing above it changed."""
    given, untouched = _from_recipe(_Given(ref, "")), Config().model_dump()
    recipe = _resolved({}, given).model_dump()
    for key in given:
        *sections, name = key.split(".")
        place, cooked, plain = values, recipe, untouched
        for section in sections:
            place, cooked, plain = place[section], cooked[section], plain[section]
        if place[name] == cooked[name]:
            place[name] = plain[name]


def _flatten(table: Mapping[str, Any], prefix: str, origin: str, given: dict[str, _Given]) -> None:
    for name, value in table.items():
        key = prefix + name
        annotation = _annotation(key, origin)
        if _is_section(annotation) and isinstance(value, dict):
            _flatten(value, f"{key}.", origin, given)
        else:
            given[key] = _Given(value, origin)


def _resolved(values: dict[str, Any], given: Mapping[str, _Given]) -> Config:
    for key, one in given.items():
        if _is_section(_annotation(key, one.origin)):
            raise ConfigError(f"{key} ({one.origin}) is a section, got {one.value!r}: set one of its keys")
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = one.value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(found, given) for found in error.errors())) from None


def _sentence(found: Any, given: Mapping[str, _Given]) -> str:
    key = ".".join(str(part) for part in found["loc"])
    while key and key not in given and key not in _SECTION_KEYS:
        key = key.rpartition(".")[0]
    rule = found["msg"].removeprefix("Value error, ")
    if key not in given:
        return f"section {key!r}: {rule}" if key else rule
    return f"{key} = {given[key].value!r} ({given[key].origin}): {rule}"


def _annotation(key: str, origin: str) -> Any:
    """The type behind a dotted key. Raises ConfigError that names the nearest key."""
    model: Any = Config
    annotation: Any = Config
    for name in key.split("."):
        field = model.model_fields.get(name) if _is_section(model) else None
        if field is None:
            near = difflib.get_close_matches(key, _ALL_KEYS, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r} ({origin}): the nearest known one is {near[0]!r}")
        annotation = model = field.annotation
    return annotation


def _parsed(key: str, text: str, origin: str) -> Any:
    """Text from the environment or the command line as the key's type wants it: strings as they are, else TOML."""
    annotation = _annotation(key, origin)
    if _takes_text(annotation):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _takes_text(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return any(_takes_text(choice) for choice in get_args(annotation))
    return annotation is str


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, field.default, " ".join((field.description or "").split()))


def _toml_lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    plain = {name: value for name, value in table.items() if not isinstance(value, dict) and value is not None}
    if plain and prefix:
        yield f"\n[{prefix}]"
    for name, value in plain.items():
        # A JSON string, number, boolean or array of them is one of TOML, too.
        yield f"{name} = {json.dumps(value, ensure_ascii=False)}"
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _toml_lines(value, f"{prefix}.{name}" if prefix else name)


_ALL_KEYS = [setting.key for setting in settings()]
_SECTION_KEYS = {key.rpartition(".")[0] for key in _ALL_KEYS}


def _print_settings() -> None:
    """The table of `docs/configuration.md`."""
    lines = ["| key | default | meaning |", "|---|---|---|", *(setting.row() for setting in settings())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    _print_settings()
