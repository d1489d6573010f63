"""Which pictures are nearly the same: rescaled, recompressed or slightly cropped, but with the same things in it.

A picture's look is its difference hash (dHash, 64 bits: whether a pixel of an 8 by 9 grey copy is brighter than its
left neighbour) and the colours of 8 by 8 blocks. The hash alone is blind to colour and takes pictures of a few things
on an empty ground for one another: of 918 pictures of the shop's traffic 755 lie within 10 bits of one of its 130
held-out ones, and 8 of these show the same. The blocks tell them apart. What was cropped is found because a picture
is also looked at without its edges (`CROPS`). Owns numbers alone, like `text_index.py`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nightschool_server.errors import NotFoundError
from nightschool_server.image_check import FORMATS
from PIL import Image

MAX_BLOCK_DIFFERENCE = 48
"""Of 255, in any channel of any block. At the shop: recompression changes a block by 28 at most, a crop of 2% by 45."""
CROPS = (
    (0.0, 0.0, 0.0, 0.0),
    (0.03, 0.03, 0.03, 0.03),
    (0.055, 0.055, 0.055, 0.055),
    (0.045, 0.0, 0.0, 0.0),
    (0.0, 0.045, 0.0, 0.0),
    (0.0, 0.0, 0.045, 0.0),
    (0.0, 0.0, 0.0, 0.045),
)
"""Shares of width and height left out at left, top, right and bottom. The first is the whole picture."""

_MAX_SIZE = 256
"""Larger pictures are reduced first: seven looks at a photograph then cost what one does."""
_BLOCKS = 8
_HASH_BYTES, _BLOCK_BYTES = 8, _BLOCKS * _BLOCKS * 3

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """How a picture looks, whole and without its edges."""

    hashes: Bytes
    """(crops, 8)."""
    blocks: Bytes
    """(crops, 192): RGB of each block, row by row."""

    def to_bytes(self) -> bytes:
        """As it is kept in a row."""
        return self.hashes.tobytes() + self.blocks.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Look:
        """What `to_bytes` gave."""
        num_crops = len(data) // (_HASH_BYTES + _BLOCK_BYTES)
        values = np.frombuffer(data, np.uint8)
        at = num_crops * _HASH_BYTES
        return Look(values[:at].reshape(num_crops, -1), values[at:].reshape(num_crops, -1))

    def is_like(self, other: Look, max_distance: int) -> bool:
        """Whether one is the other, or the other without a little of its edges."""
        return PictureIndex([other]).has_like(self, max_distance)


def look_at(data: bytes) -> Look | None:
    """The look of an encoded picture; None where the bytes are none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                opened.draft("RGB", (_MAX_SIZE, _MAX_SIZE))
                image = opened.convert("RGB")
    except Exception:  # Pillow's format plugins raise whatever their parsing runs into
        return None
    image.thumbnail((_MAX_SIZE, _MAX_SIZE), Image.Resampling.BOX)
    views = [_crop(image, edges) for edges in CROPS]
    return Look(np.stack([_hash(view) for view in views]), np.stack([_blocks(view) for view in views]))


class PictureIndex:
    """Pictures, to be asked whether one of them looks like another one."""

    def __init__(self, looks: Iterable[Look]) -> None:
        listed = list(looks)
        self._num_pictures = len(listed)
        if listed:
            self._hashes = np.concatenate([look.hashes for look in listed])
            self._blocks = np.concatenate([look.blocks for look in listed])

    def __len__(self) -> int:
        return self._num_pictures

    def has_like(self, look: Look, max_distance: int) -> bool:
        """Whether a picture of the index is `look`, or either is the other without a little of its edges."""
        if not self._num_pictures:
            return False
        if _is_among(look, 0, self._hashes, self._blocks, max_distance):
            return True
        hashes, blocks = self._hashes[:: len(CROPS)], self._blocks[:: len(CROPS)]
        return any(_is_among(look, crop, hashes, blocks, max_distance) for crop in range(1, len(CROPS)))


class Looks:
    """The looks of pictures by sha256, each taken once."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        """`read` gives the bytes of a sha256, or raises NotFoundError."""
        self._read = read
        self._known: dict[str, Look | None] = {}

    def __call__(self, sha256: str) -> Look | None:
        """None where it is no picture, or not there: what is missing now may come yet."""
        if sha256 not in self._known:
            try:
                self._known[sha256] = look_at(self._read(sha256))
            except NotFoundError:
                return None
        return self._known[sha256]


def _is_among(look: Look, crop: int, hashes: Bytes, blocks: Bytes, max_distance: int) -> bool:
    """Whether one of the views that `hashes` and `blocks` describe looks like the view `crop` of `look`."""
    near = np.bitwise_count(hashes ^ look.hashes[crop]).sum(axis=1) <= max_distance
    difference = np.abs(blocks[near].astype(np.int16) - look.blocks[crop].astype(np.int16))
    return bool((difference <= MAX_BLOCK_DIFFERENCE).all(axis=1).any())


def _crop(image: Image.Image, edges: Sequence[float]) -> Image.Image:
    width, height = image.size
    left, top, right, bottom = edges
    box = (round(left * width), round(top * height), round(width - right * width), round(height - bottom * height))
    return image.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))


def _hash(image: Image.Image) -> Bytes:
    grey = np.asarray(image.convert("L").resize((_BLOCKS + 1, _BLOCKS), Image.Resampling.LANCZOS))
    return np.packbits(grey[:, 1:] > grey[:, :-1])


def _blocks(image: Image.Image) -> Bytes:
    return np.asarray(image.resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)).reshape(-1)
