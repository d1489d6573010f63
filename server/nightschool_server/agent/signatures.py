"""Tools as Python functions: the names and parameters that code calls, and the text that tells a model of them.

A tool's name becomes an identifier: every character that cannot be in one becomes `_` (`time.now` is `time_now`).
Positions are taken in the order of the text: required parameters first.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nightschool_server.chat import ToolSpec
from nightschool_server.errors import AppError
from nightschool_server.sandbox.sandbox import Function

_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None", "object": "dict"}
RESERVED = ("final_answer", "print", "ToolError")
MAX_LITERALS = 12


def functions_of(tools: Sequence[ToolSpec]) -> list[Function]:
    """The tools as functions, in their order. Raises AppError where two get the same name."""
    seen: dict[str, str] = dict.fromkeys(RESERVED, "Python's own")
    functions = []
    for tool in tools:
        name = re.sub(r"\W", "_", tool.name, flags=re.ASCII)
        name = f"{name}_" if keyword.iskeyword(name) else name
        if name in seen:
            raise AppError(f"tools {seen[name]!r} and {tool.name!r} are both {name}() in code: rename one")
        seen[name] = tool.name
        functions.append(Function(name, tool.name, tuple(_parameters(tool.schema))))
    return functions


def signature(tool: ToolSpec, function: Function) -> str:
    """The function as a stub with a docstring."""
    properties, required = _properties(tool.schema), tool.schema.get("required", ())
    shown = []
    for name in function.parameters:
        hint = hint_of(properties[name])
        default = "" if name in required else f" = {_default(properties[name])}"
        shown.append(f"{name}: {hint}{default}")
    lines = [tool.description.strip()]
    described = [(n, str(properties[n].get("description", "")).strip()) for n in function.parameters]
    lines += [f"{name}: {text}" for name, text in described if text]
    body = "\n    ".join(" ".join(line.split()) for line in lines).replace('"""', "'''")
    return f'def {function.function}({", ".join(shown)}):\n    """{body}"""'


def hint_of(schema: Any) -> str:
    """A JSON Schema as a type hint, as near as a line comes to it."""
    if not isinstance(schema, Mapping):
        return "Any"
    if "enum" in schema and len(schema["enum"]) <= MAX_LITERALS:
        return f"Literal[{', '.join(repr(value) for value in schema['enum'])}]"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(dict.fromkeys(hint_of(option) for option in schema[key]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_TYPES.get(one, "list" if one == "array" else "Any") for one in kind)
    if kind == "array":
        return f"list[{hint_of(schema['items'])}]" if "items" in schema else "list"
    return _TYPES.get(str(kind), "Any")


def _parameters(schema: Mapping[str, Any]) -> list[str]:
    names = list(_properties(schema))
    required = schema.get("required", ())
    return sorted(names, key=lambda name: name not in required)


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties", {})
    return {name: value if isinstance(value, Mapping) else {} for name, value in properties.items()}


def _default(schema: Mapping[str, Any]) -> str:
    return repr(schema["default"]) if "default" in schema and len(json.dumps(schema["default"])) < 80 else "..."
