"""What a call of an MCP tool gave back, as an observation: text that the model reads, images that it sees.

Owns the words for what is neither. The model's view of Python's tools is `tools/call.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mcp_types as types

from nightschool_server.chat import canonical_json
from nightschool_server.image_check import check_image


@dataclass(frozen=True)
class Observation:
    """A result in the model's terms."""

    text: str
    is_error: bool = False
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by sha256, in their order."""


def observation_of(result: types.CallToolResult) -> Observation:
    """The texts in their order, one under the other; images apart; a line for what is neither.

    Structured content is shown where there is no text, since a server repeats it there. Hashes and checks images: off
    the event loop where there are any, please.
    """
    images: dict[str, bytes] = {}
    lines = [line for block in result.content if (line := _line(block, images))]
    if not lines and result.structured_content is not None:
        lines = [canonical_json(result.structured_content)]
    text = "\n".join(lines)
    if result.is_error:
        return Observation(f"error: {text or 'the tool failed and did not say why'}", True, images)
    return Observation(text or ("" if images else "done"), False, images)


def has_images(content: Sequence[types.ContentBlock]) -> bool:
    """Whether reading the result takes time."""
    return any(not isinstance(block, types.TextContent) for block in content)


def _line(block: types.ContentBlock, images: dict[str, bytes]) -> str:
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent():
            return _image(block.data, block.mime_type, images)
        case types.AudioContent():
            return f"[audio, {block.mime_type}, {_num_bytes(block.data)} bytes: it cannot be played here]"
        case types.ResourceLink():
            about = "".join(f", {each}" for each in (block.mime_type, block.description) if each)
            return f"[resource {block.name}: {block.uri}{about}]"
        case types.EmbeddedResource(resource=types.TextResourceContents() as resource):
            return f"[resource {resource.uri}]\n{resource.text}"
        case types.EmbeddedResource(resource=types.BlobResourceContents() as resource):
            mime_type = resource.mime_type or "unknown type"
            if mime_type.startswith("image/"):
                return _image(resource.blob, mime_type, images)
            return f"[resource {resource.uri}, {mime_type}, {_num_bytes(resource.blob)} bytes]"
    return f"[{block.type}: not shown]"


def _image(encoded: str, mime_type: str, images: dict[str, bytes]) -> str:
    try:
        data = base64.b64decode(encoded, validate=True)
        check_image(data)
    except (binascii.Error, ValueError) as error:
        return f"[image, {mime_type}, that cannot be shown: it {error}]"
    images[hashlib.sha256(data).hexdigest()] = data
    return ""


def _num_bytes(encoded: str) -> int:
    return len(encoded) * 3 // 4 - encoded[-2:].count("=")
