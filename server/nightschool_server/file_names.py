"""What a task's file may be called, and what it is taken for.

A name is one file in the workspace and a word of the model's prompt: no folder, no control character, no surprise.
Requests and what tools give back are held to the same rules.
"""

from __future__ import annotations

import mimetypes
import re

MAX_NAME_BYTES = 255
"""What file systems take for one name."""

DEFAULT_MEDIA_TYPE = "application/octet-stream"

_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}/[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)


def name_fault(name: str) -> str | None:
    """A predicate that says what is wrong with a file's name, None where nothing is."""
    if not name:
        return "is empty: name the file as the tools are to find it"
    if "/" in name or "\\" in name or name in (".", ".."):
        return f"is {name[:80]!r}, which is a path: send one name without a folder"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"has {len(name.encode('utf-8', 'replace'))} bytes, but may have at most {MAX_NAME_BYTES}: shorten it"
    if not name.isprintable() or name != name.strip():
        return f"is {name[:80]!r}, but may hold printable characters only and no spaces around them"
    return None


def media_type_fault(media_type: str) -> str | None:
    """A predicate that says what is wrong with a media type, None where nothing is."""
    if _MEDIA_TYPE.fullmatch(media_type) is None:
        return f"is {media_type[:80]!r}, which is no media type: write one like text/csv, or leave it out"
    return None


def media_type_of(name: str) -> str:
    """The media type that a name suggests."""
    return mimetypes.guess_type(name)[0] or DEFAULT_MEDIA_TYPE
