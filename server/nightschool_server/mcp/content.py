"""What a call of an MCP tool gave back, as an observation: text that the model reads, images that it sees.

Owns the words for what is neither. The model's view of Python's tools is `tools/call.py`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mcp_types as types

from nightschool_server.chat import canonical_json
from nightschool_server.image_check import DEFAULT_LIMITS, ImageLimits, check_image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Observation:
    """A result in the model's terms."""

    text: str
    is_error: bool = False
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by sha256, in their order."""
    is_json: bool = False
    """Whether the text is the structured content's value, not a text about it."""


async def observation_of(result: types.CallToolResult, limits: ImageLimits = DEFAULT_LIMITS) -> Observation:
    """The texts in their order, one under the other; images apart; a line for what is neither.

    Structured content is shown where there is no text, since a server repeats it there.
    """
    if all(isinstance(block, types.TextContent) for block in result.content):
        return _observation(result, limits)
    return await asyncio.to_thread(_observation, result, limits)  # Images are decoded, hashed and checked.


def _observation(result: types.CallToolResult, limits: ImageLimits) -> Observation:
    images: dict[str, bytes] = {}
    lines = [line for block in result.content if (line := _line(block, images, limits))]
    if not lines and result.structured_content is not None:
        lines = [canonical_json(result.structured_content)]
    text = "\n".join(lines)
    if result.is_error:
        return Observation(f"error: {text or 'the tool failed and did not say why'}", True, images)
    if images:
        return Observation(text or ("1 image" if len(images) == 1 else f"{len(images)} images"), False, images)
    return Observation(text or "done", is_json=_is_value(text, result.structured_content))


def _is_value(text: str, structured: Any) -> bool:
    """Whether `text` says as JSON what the structured content says; one value stands under `result` there."""
    if structured is None:
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return structured in (value, {"result": value})


def _line(block: types.ContentBlock, images: dict[str, bytes], limits: ImageLimits) -> str:
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent():
            return _image(block.data, block.mime_type, images, limits)
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
                return _image(resource.blob, mime_type, images, limits)
            return f"[resource {resource.uri}, {mime_type}, {_num_bytes(resource.blob)} bytes]"
    return f"[{block.type}: not shown]"


def _image(encoded: str, mime_type: str, images: dict[str, bytes], limits: ImageLimits) -> str:
    if len(images) == limits.max_images:
        return f"[image, {mime_type}, that is not shown: at most {limits.max_images} are]"
    try:
        data = mended(base64.b64decode(encoded, validate=True))
        check_image(data, limits)
    except (binascii.Error, ValueError) as error:
        return f"[image, {mime_type}, that cannot be shown: it {error}]"
    images[hashlib.sha256(data).hexdigest()] = data
    return ""


def mended(data: bytes) -> bytes:
    """A PNG without the ancillary chunks whose checksum is wrong; anything else as it is.

    Browsers show such a PNG and Pillow refuses it. The protocol's own reference server sends one.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunk = data[at:end]
        is_ancillary = bool(chunk[4] & 0x20)  # A lower-case first letter, in the format's words.
        if not is_ancillary or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            kept.append(chunk)
        at = end
    return b"".join(kept)


def _num_bytes(encoded: str) -> int:
    return len(encoded) * 3 // 4 - encoded[-2:].count("=")
