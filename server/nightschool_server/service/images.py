"""The bytes of the images that a request names: those that came along, those sent lately, those in the blob store.

Owns the small cache of recent images: a caller may name what it has just sent before the log has written it, and
the next step of a conversation reads no disk. A sha256 that nobody has sent is refused by its field.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping

from nightschool_server.errors import InvalidRequestError
from nightschool_server.image_check import ImageLimits, check_image
from nightschool_server.service.wire_images import ImageParts, unknown_sha256

ReadBlob = Callable[[str], bytes | None]
"""The bytes of a blob by sha256, None where there is none; reads the disk."""


class RecentImages:
    """The images sent last, by sha256, within a budget of bytes."""

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: OrderedDict[str, bytes] = OrderedDict()

    def get(self, sha256: str) -> bytes | None:
        """The bytes, if they are still here."""
        data = self._images.get(sha256)
        if data is not None:
            self._images.move_to_end(sha256)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep the bytes; the least recently used make room."""
        if sha256 in self._images or len(data) > self._max_bytes:
            return
        self._images[sha256] = data
        self._num_bytes += len(data)
        while self._num_bytes > self._max_bytes:
            _, dropped = self._images.popitem(last=False)
            self._num_bytes -= len(dropped)

    def forget_all(self) -> None:
        """Drop everything: what was erased must not be nameable any more."""
        self._images.clear()
        self._num_bytes = 0


class Images:
    """Finds the bytes of every image of a request."""

    def __init__(self, read_blob: ReadBlob) -> None:
        self._read_blob = read_blob
        self.recent = RecentImages()

    async def bytes_of(self, parts: ImageParts, *, keep: bool) -> Mapping[str, bytes]:
        """Encoded bytes by sha256 of every image part; `keep` lets later requests name those that came along.

        Raises InvalidRequestError naming the field of a sha256 that is not known.
        """
        found: dict[str, bytes] = {}
        for sha256, path in parts.fields.items():
            sent = parts.sent.get(sha256)
            data = sent.data if sent is not None else self.recent.get(sha256)
            if data is None:
                data = await asyncio.to_thread(self._read, sha256, path, parts.limits)
            if sent is None or keep:
                self.recent.put(sha256, data)
            found[sha256] = data
        return found

    def _read(self, sha256: str, path: str, limits: ImageLimits) -> bytes:
        """The image in the blob store; files lie there as well, so what it holds is looked at."""
        data = self._read_blob(sha256)
        if data is None:
            raise unknown_sha256(sha256, path)
        try:
            check_image(data, limits)
        except ValueError as fault:
            raise InvalidRequestError(f"{path}.sha256", f"{path}.sha256 {sha256} {fault}") from None
        return data
