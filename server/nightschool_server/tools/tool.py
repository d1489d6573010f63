"""Tools as an application writes them: plain functions with type hints, docstrings and a declared effect.

Owns the `@tool` decorator, `Tool`, and the `ToolContext` that a tool may ask for. Tools run in worker
processes (`workers.py`), never in the server's own; checking arguments is `arguments.py`.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, overload

from nightschool_server.chat import ToolSpec, canonical_json
from nightschool_server.errors import AppError
from nightschool_server.tools.effects import EFFECTS, Effect
from nightschool_server.tools.schema import convert, describe, schema_of_parameters

TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


@dataclass
class ToolContext:
    """What a tool may change; a parameter with this annotation is filled in and hidden from the model."""

    state: dict[str, Any]
    """The task's own state: JSON values only. What is in it after the call, the next call finds."""
    workspace: Path
    """The task's own folder, the working directory of the call. Keep relative paths in `state`:
    in practice the folder is copied for every candidate."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    spec: ToolSpec
    function: Callable[..., Any] = field(repr=False)
    effect: Effect = "external"
    timeout_s: float | None = None
    """None takes the application's `tool_timeout_s`."""
    simulate: Callable[..., Any] | None = field(default=None, repr=False)
    """Answers in practice in place of an external tool; takes the same arguments."""

    def __post_init__(self) -> None:
        if not TOOL_NAME.fullmatch(self.spec.name):
            raise AppError(
                f"{self.where}: tool name {self.spec.name!r} must match {TOOL_NAME.pattern}: rename the function"
            )
        if self.effect not in EFFECTS:
            raise AppError(f"{self.where}: effect {self.effect!r} must be one of {', '.join(sorted(EFFECTS))}")
        if self.timeout_s is not None and not 0 < self.timeout_s <= 3600:
            raise AppError(f"{self.where}: timeout_s is {self.timeout_s}; it must be above 0 and at most 3600")
        if self.simulate is not None:
            self._check_simulator(self.simulate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, as its own tests do."""
        return self.function(*args, **kwargs)

    @property
    def where(self) -> str:
        """File and line of the function, for messages."""
        return where_of(self.function)

    def prepare(self, arguments: Mapping[str, Any], context: ToolContext, *, simulate: bool = False) -> partial[Any]:
        """The call of the function, or of its simulator, with JSON arguments and the context put in.

        Raises TypeError and ValueError for arguments that the function does not take.
        """
        function = self.simulate if simulate else self.function
        assert function is not None, f"tool {self.spec.name!r} has no simulator"
        hints = _hints(function)
        bound = {name: convert(value, hints.get(name, Any)) for name, value in arguments.items()}
        bound |= {name: context for name, hint in hints.items() if hint is ToolContext}
        _signature(function).bind(**bound)
        return partial(function, **bound)

    def _check_simulator(self, simulator: Callable[..., Any]) -> None:
        """The simulator of an external tool takes what the tool takes; the context is each one's own affair."""
        name = self.spec.name
        if self.effect != "external":
            raise AppError(
                f"{self.where}: tool {name!r} is declared {self.effect} and has a simulator; practice runs such a tool "
                "itself: leave simulate out, or declare external"
            )
        if isinstance(simulator, Tool):
            raise AppError(f"{self.where}: the simulator of tool {name!r} is itself a tool: give a plain function")
        where = f"{where_of(simulator)}: the simulator of tool {name!r}"
        taken, theirs = _signature_of(self.function, self.where), _signature_of(simulator, where)
        if missing := [parameter for parameter in taken if parameter not in theirs]:
            raise AppError(f"{where} does not take {missing[0]!r}: give it the parameters of the tool ({self.where})")
        if unknown := [parameter for parameter in theirs if parameter not in taken]:
            raise AppError(f"{where} takes {unknown[0]!r}, which the tool ({self.where}) does not: leave it out")
        for parameter, declared in taken.items():
            if theirs[parameter] != declared:
                raise AppError(
                    f"{where} declares {parameter!r} as {theirs[parameter]}, the tool ({self.where}) as {declared}: "
                    "use the same type and default"
                )


def parameters_of(function: Callable[..., Any], where: str) -> frozenset[str]:
    """The names that a call of `function` may give. Raises AppError for a signature that cannot be read."""
    return frozenset(_signature_of(function, where))


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    effect: Effect = "external",
    timeout_s: float | None = None,
    strict: bool = False,
    simulate: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    effect: Effect = "external",
    timeout_s: float | None = None,
    strict: bool = False,
    simulate: Callable[..., Any] | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function, sync or async; its name, hints and docstring are what the model sees.

    An undeclared effect counts as "external", which practice never runs: there `simulate` answers, a function of the
    same parameters, or the call is refused. The arguments of a strict tool are held to its schema while they are
    sampled. Raises AppError with file and line for a signature that has no JSON Schema.
    """

    def make(decorated: Callable[..., Any]) -> Tool:
        return Tool(replace(_spec_of(decorated), strict=strict), decorated, effect, timeout_s, simulate)

    return make(function) if function is not None else make


# Both are read when a tool is made, so that a worker's children find them in their memory.
_signature = cache(inspect.signature)


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(inspect.unwrap(function))
    hints.pop("return", None)
    return hints


def where_of(function: Callable[..., Any]) -> str:
    """File and line of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _signature_of(function: Callable[..., Any], where: str) -> dict[str, str]:
    """The parameters that a call fills in, each as `hint` or `hint = default`."""
    try:
        hints, defaults = _parameters(function, _hints(function), where)
    except (NameError, TypeError) as error:
        raise AppError(f"{where}: a type hint cannot be read: {error}") from error
    shown = {name: inspect.formatannotation(hint) for name, hint in hints.items()}
    return {name: f"{hint} = {defaults[name]!r}" if name in defaults else hint for name, hint in shown.items()}


def _spec_of(function: Callable[..., Any]) -> ToolSpec:
    name = getattr(function, "__name__", "")
    where = f"{where_of(function)}: tool {name!r}"
    try:
        hints = _hints(function)
    except (NameError, TypeError) as error:
        raise AppError(f"{where}: a type hint cannot be read: {error}") from error
    description, arguments = describe(function)
    if not description:
        raise AppError(f"{where} has no docstring: its first line tells the model what the tool does")
    shown, defaults = _parameters(function, hints, where)
    if unknown := sorted(set(arguments) - set(shown)):
        raise AppError(f"{where}: the docstring describes {unknown[0]!r}, which is not a parameter")
    try:
        schema = canonical_json(schema_of_parameters(shown, defaults, arguments))
    except (TypeError, ValueError) as error:
        raise AppError(f"{where}: {error}") from error
    return ToolSpec(name, description, schema)


def _parameters(
    function: Callable[..., Any], hints: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hints of the parameters that the model sees, and the defaults among them."""
    shown: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in _signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise AppError(f"{where}: parameter {name!r} must be one that can be given by name")
        if name not in hints:
            raise AppError(f"{where}: parameter {name!r} has no type hint")
        if hints[name] is ToolContext:
            continue
        shown[name] = hints[name]
        if parameter.default is not parameter.empty:
            try:
                json.dumps(parameter.default, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise AppError(f"{where}: the default of {name!r} is not a JSON value: {error}") from error
            defaults[name] = parameter.default
    return shown, defaults
