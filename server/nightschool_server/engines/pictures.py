"""Images on their way into the model: decode, preprocess, and the text block that stands for them.

Owns the image processor of the served model and a cache of preprocessed images by content hash. An
image becomes the same tensors and the same placeholder block whatever prompt it stands in, so both are
made once. The vision tower itself runs on the owner thread (see `runner.py`).
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image as PillowImage

from nightschool_server.errors import InvalidRequestError

_MAX_PIXELS = 64 * 2**20
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Picture:
    """One preprocessed image."""

    sha256: str
    inputs: dict[str, torch.Tensor]
    """What `get_image_features` takes: pixel_values and whatever describes them, a batch of one image."""
    block: str
    """The text that replaces the image's mark in a rendered prompt."""
    num_placeholders: int
    """How often the block holds the placeholder token: one per feature row."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.inputs.values())


class ImageProcessor(Protocol):
    """Turns a picture into the model's inputs and its placeholder block."""

    def __call__(self, image: Any) -> tuple[dict[str, torch.Tensor], str]:
        """(tensors, block)."""
        ...


class WholeProcessor:
    """A model's own processor: the block is what it makes of the image mark alone."""

    def __init__(self, processor: Any, tokenizer: Any, image_mark: str) -> None:
        self._processor, self._tokenizer, self._mark = processor, tokenizer, image_mark

    def __call__(self, image: Any) -> tuple[dict[str, torch.Tensor], str]:
        batch = self._processor(text=[self._mark], images=[image], return_tensors="pt", add_special_tokens=False)
        ids = batch.pop("input_ids")[0]
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            batch.pop(name, None)
        block = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, block


class GridProcessor:
    """The Qwen-VL way without their processor, which needs torchvision for its videos: one placeholder
    per merged patch of the grid."""

    def __init__(self, image_processor: Any, image_mark: str) -> None:
        self._image_processor, self._mark = image_processor, image_mark

    def __call__(self, image: Any) -> tuple[dict[str, torch.Tensor], str]:
        batch = self._image_processor(images=[image], return_tensors="pt")
        num_patches = int(batch["image_grid_thw"][0].prod())
        return dict(batch), self._mark * (num_patches // self._image_processor.merge_size**2)


class Pictures:
    """Preprocessed images by sha256, the least recently used dropped; safe from several threads."""

    def __init__(self, process: ImageProcessor, image_mark: str) -> None:
        self._process, self.image_mark = process, image_mark
        self._lock = threading.Lock()
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._size_bytes = 0

    def get(self, sha256: str, data: bytes) -> Picture:
        """The picture of encoded bytes; raises InvalidRequestError where they are no image."""
        with self._lock:
            known = self._pictures.get(sha256)
            if known is not None:
                self._pictures.move_to_end(sha256)
                return known
        inputs, block = self._preprocess(sha256, decode(sha256, data))
        picture = Picture(sha256, inputs, block, block.count(self.image_mark))
        with self._lock:
            if sha256 not in self._pictures:
                self._pictures[sha256] = picture
                self._size_bytes += picture.size_bytes
            while self._size_bytes > _CACHE_BYTES and len(self._pictures) > 1:
                self._size_bytes -= self._pictures.popitem(last=False)[1].size_bytes
        return picture

    def _preprocess(self, sha256: str, image: Any) -> tuple[dict[str, torch.Tensor], str]:
        try:
            return self._process(image)
        except Exception as error:
            # Processors refuse sizes and shapes with errors of every kind; all of it is about this image.
            raise InvalidRequestError(
                "images",
                f"image {sha256[:8]} of {image.width} x {image.height} pixels cannot be preprocessed ({error}): "
                "send another size or shape",
            ) from error


def decode(sha256: str, data: bytes) -> Any:
    """The RGB image of encoded bytes. Raises InvalidRequestError where they are none, or too large a one."""
    name = f"image {sha256[:8]} ({len(data)} bytes)"
    try:
        image = PillowImage.open(io.BytesIO(data))
    except (OSError, ValueError, PillowImage.DecompressionBombError) as error:
        raise InvalidRequestError(
            "images", f"{name} does not decode as an image ({type(error).__name__}): send a PNG or JPEG file"
        ) from None
    if image.width * image.height > _MAX_PIXELS:
        raise InvalidRequestError(
            "images", f"{name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are read: scale it down"
        )
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequestError("images", f"{name} is damaged ({error}): send the whole PNG or JPEG file") from None
