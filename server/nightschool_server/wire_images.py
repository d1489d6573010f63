"""Images off the wire: bytes that Pillow can open, or the sha256 of bytes that the server holds already.

Owns the check of format and size, which reads headers and checksums but decodes no pixels, and the small
cache of recently sent images. A sha256 that nobody has sent is refused by field. Long-lived bytes are the
store's blobs.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field

import PIL.Image
from nightschool_proto.v1 import content_pb2

from nightschool_server.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
"""What one decoded image may cost: 192 MB as RGB."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SentImage:
    """Encoded bytes that came with a request."""

    sha256: str
    data: bytes
    media_type: str


class RecentImages:
    """The images sent last, by sha256, within a budget of bytes: a caller may name what it just sent before the
    log has written it, and the next step of a conversation reads no disk."""

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

    def forget(self, sha256: str) -> None:
        """Drop the bytes, if they are here."""
        self._num_bytes -= len(self._images.pop(sha256, b""))


@dataclass(frozen=True)
class ImageParts:
    """What the image parts of one request hold."""

    sent: dict[str, SentImage] = field(default_factory=dict)
    """Images whose bytes came along, by sha256."""
    fields: dict[str, str] = field(default_factory=dict)
    """The field path where each sha256 stands first."""

    def add(self, image: content_pb2.Image, path: str) -> str:
        """Take the image part at `path` in; returns its sha256. See `image_of` for what it raises."""
        sha256, sent = image_of(image, path)
        self.fields.setdefault(sha256, path)
        if sent is not None:
            self.sent[sha256] = sent
        return sha256


def image_of(image: content_pb2.Image, path: str) -> tuple[str, SentImage | None]:
    """The sha256 of an image part, and its bytes where they came along.

    Raises InvalidRequestError naming `path` for a part that has neither, a sha256 that is none, or bytes that
    are no image of a known format and size. Hashes the bytes: off the event loop, please.
    """
    source = image.WhichOneof("source")
    if source == "sha256":
        if not _SHA256.fullmatch(image.sha256):
            raise InvalidRequestError(
                f"{path}.sha256",
                f"{path}.sha256 is {image.sha256[:80]!r}, but must be 64 lower-case hex digits: "
                "send the sha256 of an image sent before, or its bytes as data",
            )
        return image.sha256, None
    if source is None or not image.data:
        raise InvalidRequestError(path, f"{path} has neither data nor sha256: send the image's bytes or their sha256")
    sha256 = hashlib.sha256(image.data).hexdigest()
    return sha256, SentImage(sha256, image.data, _media_type(image.data, path))


def unknown_sha256(sha256: str, path: str) -> InvalidRequestError:
    """The refusal of a sha256 that the server holds no bytes for."""
    return InvalidRequestError(
        f"{path}.sha256",
        f"{path}.sha256 {sha256} is not known to this server (never sent, sent with NO_LOG, or erased): "
        "send the image's bytes as data",
    )


def _media_type(data: bytes, path: str) -> str:
    """The media type of encoded bytes after a look at their header and checksums."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                media_type = PIL.Image.MIME[opened.format or ""]
                opened.verify()
    except PIL.Image.DecompressionBombError as error:
        raise InvalidRequestError(f"{path}.data", f"{path}.data is too large: {error}: send a smaller one") from None
    except Exception as error:
        # Pillow's format plugins raise whatever their parsing runs into.
        known = ", ".join(FORMATS)
        raise InvalidRequestError(
            f"{path}.data",
            f"{path}.data ({len(data)} bytes beginning {data[:8].hex()}) is not an image that can be read "
            f"({type(error).__name__}): send one of {known}",
        ) from None
    if width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{path}.data",
            f"{path}.data is {width} x {height} pixels, but at most {MAX_PIXELS} are taken: send a smaller one",
        )
    return media_type
