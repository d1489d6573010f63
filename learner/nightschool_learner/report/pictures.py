"""Pictures as data URIs: small, few, and only kinds that cannot carry a script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from nightschool_server.errors import NotFoundError
from nightschool_server.store.store import Store
from PIL import Image, UnidentifiedImageError

MAX_PICTURE_BYTES = 24 * 1024
"""A larger one is shown as a smaller copy."""
MAX_SIDE = 320
"""Pixels of such a copy's longer side."""
MAX_TOTAL_BYTES = 2 * 1024 * 1024
"""Of all pictures of one page together; what comes after is named, not shown."""
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


@dataclass
class Album:
    """The pictures of one page."""

    store: Store
    held_out: Mapping[str, bytes]
    """Pictures of held-out tasks by sha256, which the store does not keep."""
    max_total_bytes: int = MAX_TOTAL_BYTES
    _uris: dict[str, str] = field(default_factory=dict)
    _num_bytes: int = 0

    def uri(self, sha256: str) -> str:
        """The picture as a data URI; empty where it cannot be shown."""
        if sha256 not in self._uris:
            uri = _data_uri(self._bytes(sha256))
            fits = self._num_bytes + len(uri) <= self.max_total_bytes
            self._num_bytes += len(uri) if fits else 0
            self._uris[sha256] = uri if fits else ""
        return self._uris[sha256]

    def _bytes(self, sha256: str) -> bytes:
        if sha256 in self.held_out:
            return self.held_out[sha256]
        try:
            return self.store.get_blob(sha256)
        except NotFoundError:
            return b""


def _data_uri(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            media_type = _MEDIA_TYPES.get(image.format or "")
            if media_type is None or len(data) > MAX_PICTURE_BYTES:
                data, media_type = _smaller(image), "image/png"
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return ""
    if len(data) > 8 * MAX_PICTURE_BYTES:
        return ""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _smaller(image: Image.Image) -> bytes:
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()
