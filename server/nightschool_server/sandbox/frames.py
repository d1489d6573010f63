"""Frames between the server and a sandbox, from the server's side: everything that comes in is bounded and checked.

Nothing that the sandbox sends is trusted: JSON of bounded size and depth, and a payload that the server stores and
hands back but never reads. `program.py` has the other side.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_JSON_BYTES = 512 * 1024
"""Of one frame from a sandbox: a call's arguments, or what a step printed."""

Frame = tuple[dict[str, Any], bytes]


class BrokenFrameError(Exception):
    """What came over the socket is no frame."""


def encode(value: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """A frame as it goes over the socket."""
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + body + payload


async def read(reader: asyncio.StreamReader, max_payload_bytes: int) -> Frame | None:
    """The next frame; None where the other end is closed. Raises BrokenFrameError."""
    try:
        header = await reader.readexactly(8)
        size, payload_size = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
        if size > MAX_JSON_BYTES or payload_size > max_payload_bytes:
            raise BrokenFrameError(f"a frame of {size} and {payload_size} bytes is too large")
        body, payload = await reader.readexactly(size), await reader.readexactly(payload_size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BrokenFrameError(f"a frame is not JSON: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise BrokenFrameError("a frame is not a JSON object")
    return value, payload


def visible(text: str) -> str:
    """`text` with half surrogate pairs and control characters replaced, but for tabs and line breaks."""
    cleaned = text.encode("utf-8", "replace").decode()
    if cleaned.isprintable():
        return cleaned
    return "".join(c if c.isprintable() or c in "\n\t " or not _is_control(c) else "�" for c in cleaned)


def _is_control(character: str) -> bool:
    return ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
