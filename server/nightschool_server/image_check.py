"""Whether encoded bytes are an image that the engine takes: format, size and checksums, without decoding a pixel.

Images come from requests, from the client's tools and from the application's; all are checked here before a model sees
them.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class ImageLimits:
    """What one request may bring."""

    max_images: int = 16
    max_bytes: int = 20 * 2**20
    """Of one encoded image."""
    max_pixels: int = 50_000_000
    """Of one decoded image; 50 million are 150 MB as RGB."""


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class CheckedImage:
    """What a look at the header of encoded bytes says."""

    media_type: str
    width: int
    height: int


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> CheckedImage:
    """The image that `data` encodes. Raises ValueError with a predicate: "has 5 bytes, but at most 4 are taken ..."."""
    import PIL.Image  # Not at the top: what only knows the limits is spared Pillow.

    if len(data) > limits.max_bytes:
        raise ValueError(
            f"has {len(data)} bytes, but at most {limits.max_bytes} are taken (log.max_image_bytes): send a smaller one"
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is only a warning up to twice its size; ours is below.
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                media_type = PIL.Image.MIME[opened.format or ""]
                opened.verify()
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"is too large: {error}: send a smaller one") from None
    except Exception as error:
        # Pillow's format plugins raise whatever their parsing runs into.
        raise ValueError(
            f"({len(data)} bytes beginning {data[:8].hex()}) is not an image that can be read "
            f"({type(error).__name__}): send one of {', '.join(FORMATS)}"
        ) from None
    if width * height > limits.max_pixels:
        raise ValueError(
            f"is {width} x {height} pixels, but at most {limits.max_pixels} pixels are taken "
            "(log.max_image_pixels): send a smaller one"
        )
    return CheckedImage(media_type, width, height)
