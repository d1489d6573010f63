"""What is the same task, and what must not be practised."""

from __future__ import annotations

import pytest
from nightschool_learner.screening import HeldOut, task_key

LONG = "a b c d e f g h i j k l m n o p"


@pytest.fixture
def held_out() -> HeldOut:
    return HeldOut(
        [
            task_key("What does one mug cost Anna?"),
            task_key("How many red circles are there?", ["img1"]),
            task_key(LONG),
        ]
    )


def test_case_punctuation_and_width_do_not_make_another_task() -> None:
    assert task_key("What does ONE mug cost, Anna?") == task_key("what does one mug cost\u00a0anna")
    assert task_key("Ｗhat") == task_key("What")


def test_numbers_and_pictures_make_another_task() -> None:
    assert task_key("3 mugs") != task_key("4 mugs")
    assert task_key("how many?", ["a"]) != task_key("how many?", ["b"])


@pytest.mark.parametrize(
    ("text", "images", "reason"),
    [
        ("what does one MUG cost anna", (), "text"),
        ("Please: what does one mug cost Anna? Thanks.", (), "text"),
        ("Anything at all", ("img1",), "image"),
        ("x y " + LONG[:25] + " z", (), "ngram"),
        ("x y " + LONG[:23] + " z", (), None),
        ("What does one lamp cost Anna?", (), None),
        ("How many red circles are there?", ("img2",), None),
        ("", (), None),
    ],
)
def test_a_held_out_task_is_found_in_any_dress(
    held_out: HeldOut, text: str, images: tuple[str, ...], reason: str | None
) -> None:
    assert held_out.match(task_key(text, images)) == reason
