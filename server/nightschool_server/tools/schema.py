"""From a Python signature to JSON Schema, and from JSON values back to what the signature asks for.

Owns which type hints a tool may use: str, int, float, bool, None, Any, list, tuple[X, ...], dict, Literal,
Optional and unions, dataclasses and TypedDicts. Light on purpose: tool workers import it. Checking
arguments against a schema is `arguments.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARG = re.compile(r"(?P<name>\w+)\s*(?:\([^)]*\))?:\s*(?P<text>.*)")
_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):\s*$")


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON Schema of values of type `hint`. Raises TypeError for a hint that tools cannot use."""
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _schema_of_literal(args)
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(arg) for arg in args]}
    if hint is list or origin in (list, Sequence):
        return {"type": "array", **({"items": schema_of(args[0])} if args else {})}
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return {"type": "array", "items": schema_of(args[0])}
    if hint is dict or origin in (dict, Mapping):
        return _schema_of_dict(args)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _schema_of_fields(typing.get_type_hints(hint), _required_fields(hint))
    if typing.is_typeddict(hint):
        return _schema_of_fields(typing.get_type_hints(hint), _required_keys(hint))
    raise TypeError(
        f"{hint!r} has no JSON Schema: use str, int, float, bool, list, dict, Literal, Optional, "
        "a dataclass or a TypedDict"
    )


def schema_of_parameters(
    hints: Mapping[str, Any], defaults: Mapping[str, Any], descriptions: Mapping[str, str]
) -> dict[str, Any]:
    """The schema of a function's arguments. `required` is sorted, so that equal signatures hash alike."""
    properties: dict[str, Any] = {}
    for name, hint in hints.items():
        properties[name] = schema_of(hint)
        if name in descriptions:
            properties[name]["description"] = descriptions[name]
        if name in defaults:
            properties[name]["default"] = defaults[name]
    required = sorted(name for name in hints if name not in defaults)
    return {"type": "object", "properties": properties, "required": required}


def convert(value: Any, hint: Any) -> Any:
    """A JSON value that matches `schema_of(hint)` as the Python value that `hint` asks for.

    JSON Schema takes 2.0 for an integer and 2 for a number; dataclasses arrive as objects.
    """
    if hint is int and isinstance(value, float):
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin in (list, Sequence) and args and isinstance(value, list):
        return [convert(item, args[0]) for item in value]
    if origin is tuple and isinstance(value, list):
        return tuple(convert(item, args[0]) for item in value)
    if origin in (dict, Mapping) and args and isinstance(value, dict):
        return {key: convert(item, args[1]) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        fields = typing.get_type_hints(hint)
        return hint(**{key: convert(item, fields.get(key, Any)) for key, item in value.items()})
    if typing.is_typeddict(hint) and isinstance(value, dict):
        fields = typing.get_type_hints(hint)
        return {key: convert(item, fields.get(key, Any)) for key, item in value.items()}
    return value


def describe(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first line of a function's docstring, and its Google-style `Args:` by name."""
    lines = (inspect.getdoc(function) or "").splitlines()
    described: dict[str, str] = {}
    name, indent, inside = "", 0, False
    for line in lines[1:]:
        if section := _SECTION.match(line):
            inside = section[1].startswith("Arg")
        elif inside and line.strip():
            depth = len(line) - len(line.lstrip())
            match = _ARG.match(line.strip())
            if match and (not name or depth <= indent):
                name, indent = match["name"], depth
                described[name] = match["text"].strip()
            elif name:
                described[name] = f"{described[name]} {line.strip()}".strip()
    return (lines[0].strip() if lines else ""), described


def _schema_of_literal(values: tuple[Any, ...]) -> dict[str, Any]:
    kinds = {_SCALARS.get(type(value)) for value in values}
    if None in kinds:
        raise TypeError(f"Literal{list(values)!r} may hold only str, int, bool and None")
    kind = {"type": kinds.pop()} if len(kinds) == 1 else {}
    return {**kind, "enum": list(values)}


def _schema_of_dict(args: tuple[Any, ...]) -> dict[str, Any]:
    if not args:
        return {"type": "object"}
    if args[0] is not str:
        raise TypeError(f"the keys of a JSON object are strings, not {args[0]!r}")
    return {"type": "object", "additionalProperties": schema_of(args[1])}


def _schema_of_fields(hints: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    properties = {name: schema_of(hint) for name, hint in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _required_keys(cls: Any) -> list[str]:
    # `__required_keys__` does not see the markers of annotations that are kept as text.
    marks = {key: typing.get_origin(hint) for key, hint in typing.get_type_hints(cls, include_extras=True).items()}
    needed = {key for key in cls.__required_keys__ if marks[key] is not typing.NotRequired}
    return sorted(needed | {key for key, mark in marks.items() if mark is typing.Required})


def _required_fields(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    return sorted(f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing)


def _convert_union(value: Any, args: tuple[Any, ...]) -> Any:
    # A value that already has one of the types stays as it is: 2 for `int | float` is an int.
    if any(isinstance(arg, type) and type(value) is arg for arg in args):
        return value
    for arg in args:
        try:
            converted = convert(value, arg)
        except TypeError:
            continue
        if converted is not value:
            return converted
    return value
