"""Checks of what a model writes into a tool call, and of the schemas that say what it may write.

Owns the use of jsonschema. Schemas may come from callers: nothing is fetched, and regular expressions
are not run, since one of them can hold up the event loop for hours. They stay visible to the model.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 32
MAX_FAULT_CHARS = 300

_extend: Any = validators.extend
_Validator: Any = _extend(Draft202012Validator, {"pattern": None})


def schema_fault(parameters: str) -> str | None:
    """What is wrong with a tool's JSON Schema (as JSON text), or None."""
    if len(parameters) > MAX_SCHEMA_CHARS:
        return f"it has {len(parameters)} characters; at most {MAX_SCHEMA_CHARS} are allowed"
    try:
        schema = json.loads(parameters)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return 'it must be an object schema: {"type": "object", "properties": {...}}'
    if fault := _structure_fault(schema):
        return fault
    try:
        _Validator.check_schema(schema)
    except exceptions.SchemaError as error:
        return _clip(f"{error.json_path}: {error.message}")
    return None


def arguments_fault(parameters: str, arguments: Any, *, closed: bool = False) -> str | None:
    """Which argument breaks which rule of a checked schema, or None.

    `closed` refuses arguments that the schema does not name, where it does not say itself.
    """
    validator = _validator(parameters, closed)
    try:
        error = exceptions.best_match(validator.iter_errors(arguments))
    except (Unresolvable, RecursionError, ArithmeticError) as raised:
        return _clip(f"the tool's schema cannot be applied: {type(raised).__name__}: {raised}")
    if error is None:
        return None
    path = error.json_path.removeprefix("$").removeprefix(".")
    return _clip(f"argument {path!r}: {error.message}" if path else error.message)


@lru_cache(maxsize=512)
def _validator(parameters: str, closed: bool) -> Any:
    schema = json.loads(parameters)
    if closed:
        schema = {"additionalProperties": False, "properties": {}, **schema}
    return _Validator(schema, registry=Registry())


def _structure_fault(schema: Any) -> str | None:
    pending = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_SCHEMA_DEPTH:
            return f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep"
        if isinstance(value, dict):
            if "patternProperties" in value:
                return "patternProperties is not supported: name the properties"
            reference = value.get("$ref", value.get("$dynamicRef", "#"))
            if isinstance(reference, str) and not reference.startswith("#"):
                return f"$ref {reference!r} points outside the schema: put the definition under $defs"
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending.extend((child, depth + 1) for child in children)
    return None


def _clip(text: str) -> str:
    return text if len(text) <= MAX_FAULT_CHARS else f"{text[:MAX_FAULT_CHARS]}…"
