"""The shop's pictures: coloured shapes on a table and price tags, drawn with Pillow, 64 by 64 pixels.

The same scene always gives the same PNG bytes. Digits are bitmaps of our own, so that no font of the
machine can change a picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

SIZE = 64
CELLS = 9
"""Places for a shape: three rows of three."""
MAX_SHIFT = 2
"""Pixels by which a shape or a number may be off its place, either way."""

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 30),
    "black": (20, 20, 20),
}

_CELL = 20
_DIGIT_SCALE = 4
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True)
class Shape:
    """One shape on the table."""

    kind: str
    colour: str
    cell: int
    """0 to 8, row by row."""
    shift: tuple[int, int]
    """Pixels right and down from the cell's middle."""


@lru_cache(maxsize=65536)
def draw_shapes(shapes: Sequence[Shape]) -> bytes:
    """A PNG of `shapes` (a tuple) on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x = 12 + _CELL * (shape.cell % 3) + shape.shift[0]
        y = 12 + _CELL * (shape.cell // 3) + shape.shift[1]
        box = (x - 7, y - 7, x + 7, y + 7)
        fill = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse(box, fill=fill)
        elif shape.kind == "square":
            pen.rectangle(box, fill=fill)
        else:
            pen.polygon(((x, y - 7), (x + 7, y + 7), (x - 7, y + 7)), fill=fill)
    return _png(image)


@lru_cache(maxsize=65536)
def draw_tag(price: int, colour: str, shift: tuple[int, int]) -> bytes:
    """A PNG of a price tag with a two-digit price and a coloured edge."""
    assert 10 <= price <= 99
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, SIZE - 1, SIZE - 1), outline=COLOURS[colour], width=4)
    for place, digit in enumerate(divmod(price, 10)):
        for row, bits in enumerate(_DIGITS[digit].split()):
            for column, bit in enumerate(bits):
                if bit == "1":
                    x = 10 + 24 * place + shift[0] + column * _DIGIT_SCALE
                    y = 18 + shift[1] + row * _DIGIT_SCALE
                    pen.rectangle((x, y, x + _DIGIT_SCALE - 1, y + _DIGIT_SCALE - 1), fill="black")
    return _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
