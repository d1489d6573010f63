"""Takes out of logged text what should not be kept: e-mail addresses, card numbers, credentials.

Patterns, not understanding: names, street addresses and the like stay. A placeholder names what was there, so that a
task written from the request still reads like one. Runs in the log's writer thread, before anything is stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from nightschool_server.chat import File, Message, Part, Text, ToolCall, ToolResult, canonical_json


class Redactor(Protocol):
    """Text in, the same text without what must not be stored out."""

    def __call__(self, text: str) -> str:
        """The redacted text. Must not raise."""
        ...


_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/-]{16,}=*")
_KEY = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|ns_[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|hf_[A-Za-z0-9]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
)

_KEY_STARTS = ("sk-", "ns_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "xox", "AKIA", "AIza", "hf_", "eyJ")
"""What each alternative of `_KEY` begins with: looking for these is far cheaper than trying it at every word."""


def redact_patterns(text: str) -> str:
    """The built-in redactor: `[email]`, `[card]` (digits that pass the Luhn check) and `[secret]`."""
    if "bearer" in text.casefold():
        text = _BEARER.sub(r"\1[secret]", text)
    if any(start in text for start in _KEY_STARTS):
        text = _KEY.sub("[secret]", text)
    if "@" in text:
        text = _EMAIL.sub("[email]", text)
    return _CARD.sub(lambda match: "[card]" if _passes_luhn(match[0]) else match[0], text)


def keep_all(text: str) -> str:
    """The redactor of `log.redact = false`."""
    return text


def redactor_of(enabled: bool) -> Redactor:
    """The redactor of `log.redact`."""
    return redact_patterns if enabled else keep_all


def redact_message(message: Message, redactor: Redactor) -> Message:
    """The message with every text in it redacted; images and what files hold stay as they are."""
    return replace(message, parts=tuple(_redact_part(part, redactor) for part in message.parts))


def _redact_part(part: Part, redactor: Redactor) -> Part:
    if isinstance(part, Text):
        return Text(redactor(part.text))
    if isinstance(part, ToolCall):
        return replace(part, arguments=_redact_json(part.arguments, redactor))
    if isinstance(part, ToolResult):
        files = tuple(_redact_file(file, redactor) for file in part.files)
        return replace(part, content=redactor(part.content), files=files)
    if isinstance(part, File):
        return _redact_file(part, redactor)
    return part


def _redact_file(file: File, redactor: Redactor) -> File:
    """Its name is text; what it holds is not looked at."""
    return replace(file, name=redactor(file.name))


def _redact_json(text: str, redactor: Redactor) -> str:
    """Inside the values, so that what was JSON stays JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return redactor(text)
    redacted = _walk(value, redactor)
    return text if redacted == value else canonical_json(redacted)


def _walk(value: Any, redactor: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redactor(value)
    if isinstance(value, int) and not isinstance(value, bool):
        digits = str(value)
        redacted = redactor(digits)
        return value if redacted == digits else redacted
    if isinstance(value, list):
        return [_walk(one, redactor) for one in value]
    if isinstance(value, dict):
        return {key: _walk(one, redactor) for key, one in value.items()}
    return value


def _passes_luhn(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
