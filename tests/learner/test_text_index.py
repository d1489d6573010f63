"""Which texts count as nearly the same, and that a cycle's screen costs next to nothing."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from nightschool_learner.screening import words_of
from nightschool_learner.text_index import SPACE, TextIndex, features_of

TASKS = [
    "Put 4 of the plain mirror in the basket for Grace and tell its total.",
    "How many of the new teapot are left for Noah?",
    "What is 12 plus 7?",
    "Mina pays 70 for goods worth 12. How much change is due?",
    "Summarise the letter that came from the bank yesterday.",
]


@pytest.fixture
def index() -> TextIndex:
    texts = [words_of(text) for text in TASKS]
    built = TextIndex(texts)
    for words in texts:
        built.add(words)
    return built


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Put 4 of the plain mirrors in the basket for Grace, tell its total", [0]),
        ("Summarise the leter that came from the bank yesterday", [4]),
        ("What is 13 plus 7?", []),
        ("What is 7 plus 12?", []),
        ("Mina pays 12 for goods worth 70. How much change is due?", []),
        ("How many of the new teapot are left for Paul and what does each of them cost?", []),
        ("Put 4 of the plain chair in the basket for Leo and tell its total.", []),
        ("", []),
    ],
)
def test_small_changes_are_found_and_other_numbers_or_things_are_not(
    index: TextIndex, text: str, found: list[int]
) -> None:
    assert index.alike(words_of(text), 0.9) == found


def test_similarities_are_those_of_a_plain_computation() -> None:
    rng = random.Random(5)
    vocabulary = [f"{a}{b}{c}" for a in "klm" for b in "aeiou" for c in "rst"]
    texts = [[rng.choice(vocabulary) for _ in range(rng.randint(3, 9))] for _ in range(40)]
    index = TextIndex(texts[:30])
    assert [index.add(text) for text in texts] == list(range(40))
    num_with = Counter(place for text in texts[:30] for place in set(features_of(text)))

    def vector(text: list[str]) -> np.ndarray:
        dense = np.zeros(SPACE)
        for place, weight in features_of(text).items():
            dense[place] = weight * (math.log(31 / (1 + num_with[place])) + 1)
        return dense / np.linalg.norm(dense)

    asked = [rng.choice(vocabulary) for _ in range(6)] + texts[35][:3]
    expected = np.array([vector(text) @ vector(asked) for text in texts])
    for bound in (0.1, 0.2, 0.4):
        near = index.alike(asked, bound)
        assert set(near) == set(np.flatnonzero(expected >= bound))
        assert list(expected[near]) == sorted(expected[near], reverse=True)
    assert index.alike(texts[3], 0.999)[0] == 3


def test_a_text_that_nobody_indexed_is_like_none() -> None:
    assert TextIndex().alike(("a", "b"), 0.1) == []
