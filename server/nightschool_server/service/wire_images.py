"""Images off the wire: bytes that Pillow can open, or the sha256 of bytes that the server holds already.

Owns what a request may name and how many; whether bytes are an image is `image_check.py`'s, finding the bytes of a
sha256 is `images.py`'s.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from nightschool_proto.v1 import content_pb2

from nightschool_server.errors import InvalidRequestError
from nightschool_server.image_check import DEFAULT_LIMITS, ImageLimits, check_image

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SentImage:
    """Encoded bytes that came with a request."""

    sha256: str
    data: bytes
    media_type: str


@dataclass(frozen=True)
class ImageParts:
    """What the image parts of one request hold."""

    limits: ImageLimits = DEFAULT_LIMITS
    sent: dict[str, SentImage] = field(default_factory=dict)
    """Images whose bytes came along, by sha256."""
    fields: dict[str, str] = field(default_factory=dict)
    """The field path where each sha256 stands first."""

    def add(self, image: content_pb2.Image, path: str) -> str:
        """Take the image part at `path` in; returns its sha256. Hashes the bytes: off the event loop, please.

        Raises InvalidRequestError naming `path` for a part that has neither bytes nor sha256, a sha256 that is none,
        and bytes that are no image of a known format and size.
        """
        if image.WhichOneof("source") == "sha256":
            sha256 = image.sha256
            if not _SHA256.fullmatch(sha256):
                raise InvalidRequestError(
                    f"{path}.sha256",
                    f"{path}.sha256 is {sha256[:80]!r}, but must be 64 lower-case hex digits: "
                    "send the sha256 of an image sent before, or its bytes as data",
                )
        elif not image.data:
            raise InvalidRequestError(
                path, f"{path} has neither data nor sha256: send the image's bytes or their sha256"
            )
        else:
            sha256 = hashlib.sha256(image.data).hexdigest()
            if sha256 not in self.sent:
                self.sent[sha256] = SentImage(sha256, image.data, _media_type(image.data, f"{path}.data", self.limits))
        self.fields.setdefault(sha256, path)
        if len(self.fields) > self.limits.max_images:
            raise InvalidRequestError(
                path,
                f"{path} is image {len(self.fields)} of the request, but at most {self.limits.max_images} are taken "
                "(log.max_images_per_request): leave the older ones out",
            )
        return sha256


def unknown_sha256(sha256: str, path: str) -> InvalidRequestError:
    """The refusal of a sha256 that the server holds no bytes for."""
    return InvalidRequestError(
        f"{path}.sha256",
        f"{path}.sha256 {sha256} is not known to this server (never sent, sent with NO_LOG, or erased): "
        "send the image's bytes as data",
    )


def _media_type(data: bytes, path: str, limits: ImageLimits) -> str:
    """The media type of encoded bytes after a look at their header and checksums."""
    try:
        return check_image(data, limits).media_type
    except ValueError as fault:
        raise InvalidRequestError(path, f"{path} {fault}") from None
