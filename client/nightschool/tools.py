"""Python functions as tools that a model may call and this client runs.

The name, the type hints and the docstring are what the model sees: the first line describes the tool, a Google-style
`Args:` section its parameters. Owns the JSON Schema of a signature and the running of one call; an exception of a tool
is an observation for the model, never an error of the task. (The server's tools are its own: the two
packages do not import each other.)
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, Union

from nightschool_proto.v1 import content_pb2

from nightschool.content import Image, ToolCall, ToolResult
from nightschool.errors import ToolError
from nightschool.messages import image_of
from nightschool.transport import Transport

_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_ARGUMENT = re.compile(r"(?P<name>\w+)\s*(?:\([^)]*\))?:\s*(?P<text>.*)")
_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):\s*$")


@dataclass(frozen=True)
class Tool:
    """A tool. Without a `function` the model may call it, and the caller deals with the call (`generate`)."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON Schema of type object."""
    function: Callable[..., Any] | None = field(default=None, repr=False)
    """Called with the arguments by name; may be async with `AsyncClient`."""
    strict: bool = False
    """Whether the server holds the arguments of a call to the schema while they are sampled."""

    @classmethod
    def of(cls, function: Callable[..., Any], *, strict: bool = False) -> Tool:
        """The tool that a type-hinted function is. Raises ToolError for a signature without a JSON Schema."""
        name = getattr(function, "__name__", "")
        description, arguments = _described(function)
        if not description:
            raise ToolError(f"tool {name!r} has no docstring: its first line tells the model what the tool does")
        return cls(name, description, _parameters(function, name, arguments), function, strict)

    def proto(self) -> content_pb2.Tool:
        """The tool for the wire."""
        schema = json.dumps(self.parameters, ensure_ascii=False, sort_keys=True)
        return content_pb2.Tool(
            name=self.name, description=self.description, parameters_json=schema, strict=self.strict
        )


ToolLike: TypeAlias = Tool | Callable[..., Any]


def tools_of(tools: Sequence[ToolLike]) -> tuple[Tool, ...]:
    """Each function as a tool. Raises ToolError for what is neither a function nor a tool."""
    for index, tool in enumerate(tools):
        if not isinstance(tool, Tool) and not callable(tool):
            raise ToolError(f"tools[{index}] is {tool!r}, but must be a function with type hints or a nightschool.Tool")
    return tuple(tool if isinstance(tool, Tool) else Tool.of(tool) for tool in tools)


async def run_tool(tools: Mapping[str, Tool], call: ToolCall, transport: Transport) -> ToolResult:
    """What a call gives: text as it is, anything else as JSON; a failure as the text of an error."""
    tool = tools.get(call.name)
    try:
        if tool is None or tool.function is None:
            raise ToolError(f"this client has no tool {call.name!r} that it can run")
        content, images = _taken_apart(await transport.run_tool(tool.function, call.arguments))
    except Exception as error:
        return ToolResult(call.id, call.name, f"{type(error).__name__}: {error}", is_error=True)
    return ToolResult(call.id, call.name, content, images=images)


def _taken_apart(returned: Any) -> tuple[str, tuple[Image, ...]]:
    """What the model reads of a returned value, and the images in it: alone, or in a list or tuple."""
    parts = returned if isinstance(returned, (list, tuple)) else [returned]
    images = tuple(image_of(part) for part in parts if _is_image(part))
    if not images:
        return _text_of(returned), ()
    texts = [_text_of(part) for part in parts if not _is_image(part)]
    return "\n".join(texts) or ("1 image" if len(images) == 1 else f"{len(images)} images"), images


def _is_image(value: Any) -> bool:
    """Whether it is this package's or Pillow's; other things have a `save` too."""
    return isinstance(value, Image) or any(
        kind.__module__.startswith("PIL.") and kind.__name__ == "Image" for kind in type(value).__mro__
    )


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _parameters(function: Callable[..., Any], name: str, descriptions: Mapping[str, str]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError) as error:
        raise ToolError(f"a type hint of tool {name!r} cannot be read: {error}") from error
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"parameter {parameter.name!r} of tool {name!r} must be one that can be given by name")
        if parameter.name not in hints:
            raise ToolError(f"parameter {parameter.name!r} of tool {name!r} has no type hint: the model needs its type")
        try:
            schema = _schema(hints[parameter.name])
        except TypeError as error:
            raise ToolError(f"parameter {parameter.name!r} of tool {name!r}: {error}") from None
        if parameter.name in descriptions:
            schema["description"] = descriptions[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    return {"type": "object", "properties": properties, "required": sorted(required)}


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema of values of type `hint`. Raises TypeError for a hint that tools cannot use."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is Literal:
        kinds = {_SCALARS.get(type(value)) for value in args}
        return {"enum": list(args), **({"type": kinds.pop()} if len(kinds) == 1 else {})}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(arg) for arg in args]}
    if hint is list or origin is list:
        return {"type": "array", **({"items": _schema(args[0])} if args else {})}
    if hint is dict or (origin is dict and args[0] is str):
        return {"type": "object", **({"additionalProperties": _schema(args[1])} if args else {})}
    raise TypeError(
        f"{hint!r} has no JSON Schema here: use str, int, float, bool, list, dict, Literal or a union of them"
    )


def _described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first line of a docstring, and its `Args:` by name."""
    lines = (inspect.getdoc(function) or "").splitlines()
    described: dict[str, str] = {}
    name, indent, is_inside = "", 0, False
    for line in lines[1:]:
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if section := _SECTION.match(line):
            is_inside = section[1].startswith("Arg")
        elif is_inside and text:
            match = _ARGUMENT.match(text)
            if match and (not name or depth <= indent):
                name, indent = match["name"], depth
                described[name] = match["text"]
            elif name:
                described[name] = f"{described[name]} {text}"
    return (lines[0].strip() if lines else ""), described
