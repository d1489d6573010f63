"""A prompt as an OpenAI-compatible endpoint reads it: chat messages, pictures as data URLs.

Owns the rendering alone. The learner's own roles write text and pictures; a conversation's tool calls and results are
shown to them inside their text, so none arrives here.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from nightschool_server.chat import Image, Text
from nightschool_server.engine import Prompt

ReadBlob = Callable[[str], bytes]

_MEDIA_TYPES = ((b"\x89PNG", "image/png"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))


def to_openai(prompt: Prompt, read_blob: ReadBlob) -> list[dict[str, Any]]:
    """The messages, their pictures from `prompt.images` or, where they are not there, from `read_blob`."""
    rendered: list[dict[str, Any]] = []
    for message in prompt.messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            match part:
                case Text(text):
                    content.append({"type": "text", "text": text})
                case Image(sha256):
                    data = prompt.images.get(sha256) or read_blob(sha256)
                    content.append({"type": "image_url", "image_url": {"url": data_url(data)}})
                case _:
                    raise AssertionError(f"a role's message holds no {type(part).__name__}")
        # Many endpoints take content parts from users alone.
        plain = all(part["type"] == "text" for part in content)
        rendered.append({"role": message.role, "content": message.text if plain else content})
    return rendered


def num_text_chars(prompt: Prompt) -> int:
    """Characters of all texts."""
    return sum(len(message.text) for message in prompt.messages)


def data_url(data: bytes) -> str:
    """Image bytes as a URL that holds them."""
    media_type = next((name for magic, name in _MEDIA_TYPES if data.startswith(magic)), "image/jpeg")
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
