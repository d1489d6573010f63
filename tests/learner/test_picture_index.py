"""Which pictures count as nearly the same: changed copies of the shop's, never two that show different things."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import islice

import pytest
from nightschool_learner.picture_index import Look, Looks, PictureIndex, look_at
from nightschool_server.errors import NotFoundError
from PIL import Image

from examples.shop.pictures import Shape, draw_shapes, draw_tag
from examples.shop.traffic import traffic

BITS = 10
SCENE = (Shape("circle", "red", 0, (0, 0)), Shape("square", "blue", 4, (1, -1)), Shape("triangle", "green", 7, (0, 2)))
PICTURES = {"shapes": draw_shapes(SCENE), "tag": draw_tag(41, "red", (0, 0))}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def encoded(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def cropped(image: Image.Image, pixels: int) -> Image.Image:
    return image.crop((pixels, pixels, image.width - pixels, image.height - pixels))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "enlarged": lambda image: encoded(image.resize((200, 200), Image.Resampling.BICUBIC)),
    "reduced": lambda image: encoded(image.resize((32, 32), Image.Resampling.BICUBIC)),
    "jpeg": lambda image: encoded(image, "JPEG", quality=40),
    "webp": lambda image: encoded(image, "WEBP", quality=50),
    "cropped by 2%": lambda image: encoded(cropped(image, 1)),
    "cropped by 3%": lambda image: encoded(cropped(image, 2)),
    "one edge off": lambda image: encoded(image.crop((3, 0, image.width, image.height))),
    "all of it": lambda image: encoded(cropped(image.resize((200, 200)), 5), "JPEG", quality=60),
}


def look(data: bytes) -> Look:
    found = look_at(data)
    assert found is not None
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("picture", PICTURES)
def test_a_changed_copy_is_the_same_picture_whichever_was_there_first(picture: str, change: str) -> None:
    original, copy = look(PICTURES[picture]), look(CHANGES[change](opened(PICTURES[picture])))
    assert PictureIndex([original]).has_like(copy, BITS)
    assert PictureIndex([copy]).has_like(original, BITS)
    assert original.is_like(copy, BITS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (draw_tag(41, "red", (0, 0)), draw_tag(47, "red", (0, 0))),
        (draw_tag(41, "red", (0, 0)), draw_tag(41, "green", (0, 0))),
        (draw_shapes(SCENE), draw_shapes(SCENE[:2])),
        (draw_shapes(SCENE), draw_shapes((*SCENE[:2], Shape("triangle", "black", 7, (0, 2))))),
        (draw_shapes(SCENE[:1]), draw_shapes((Shape("circle", "red", 1, (0, 0)),))),
    ],
)
def test_another_number_colour_or_count_is_another_picture(one: bytes, other: bytes) -> None:
    assert not look(one).is_like(look(other), BITS)


def test_of_the_shop_s_traffic_only_the_same_scene_is_taken_for_a_known_picture() -> None:
    requests = [request for request in islice(traffic(5), 1200) if request.images]
    known, asked = requests[:120], requests[120:]
    index = PictureIndex(look(request.images[0]) for request in known)
    alike = [request for request in asked if index.has_like(look(request.images[0]), BITS)]
    assert len(asked) > 200
    assert len(alike) < len(asked) * 0.03
    for request in alike:
        mine = look(request.images[0])
        twins = [one for one in known if look(one.images[0]).is_like(mine, BITS)]
        assert {one.family for one in twins} <= ({"tag"} if request.family == "tag" else {"count", "colour"})


def test_a_look_survives_its_row() -> None:
    original = look(PICTURES["tag"])
    kept = Look.from_bytes(original.to_bytes())
    assert kept.to_bytes() == original.to_bytes()
    assert kept.is_like(original, 0)


def test_what_is_no_picture_has_no_look_and_is_read_once() -> None:
    reads: list[str] = []

    def read(sha256: str) -> bytes:
        reads.append(sha256)
        if sha256 == "gone":
            raise NotFoundError("blob", sha256, "gone")
        return b"a,b\n1,2\n" if sha256 == "table" else PICTURES["tag"]

    looks = Looks(read)
    assert [looks(sha256) for sha256 in ("gone", "table", "table", "gone")] == [None] * 4
    assert looks("tag") is looks("tag") is not None
    assert reads == ["gone", "table", "gone", "tag"], "what is missing may come yet"


def test_an_index_of_nothing_has_nothing_like_it() -> None:
    assert not PictureIndex(()).has_like(look(PICTURES["tag"]), 64)
