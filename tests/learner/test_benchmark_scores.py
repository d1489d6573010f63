"""The rules of GTA and GAIA, case by case."""

from __future__ import annotations

import itertools
import random

import pytest
from nightschool_learner.benchmarks.gaia_scores import final_answer, is_right
from nightschool_learner.benchmarks.gta_scores import Phrases, matched_tools, official, sport


def phrases(whitelist: list[list[str]], blacklist: list[list[str]] | None = None) -> Phrases:
    return Phrases(tuple(map(tuple, whitelist)), tuple(map(tuple, blacklist or [])))


CITY = phrases([["Rome", "Roma"], ["Italy"]], [["Paris"], ["Lyon", "Nice"]])


@pytest.mark.parametrize(
    ("answer", "reference", "by_official", "by_sport"),
    [
        ("It is Rome, in Italy.", CITY, True, True),
        ("ROMA (italy)", CITY, True, True),  # without case; any alias of a group
        ("Rome.", CITY, False, False),  # every group is needed
        ("Romans live in Italy.", CITY, False, True),  # Roma within a longer word
        ("Rome in Italy, not Paris", CITY, False, False),  # an alias of the blacklist
        ("Rome in Italy, not lyon", CITY, False, False),
        ("Rome in Italy, a nicer place", CITY, True, False),  # Nice within a longer word
        ("12", phrases([["12"]]), True, True),
        ("112", phrases([["12"]]), False, True),
        ("12.5", phrases([["12"]]), True, True),  # a point is a word boundary
        ("12_", phrases([["12"]]), False, True),  # an underscore is none
        ("50%", phrases([["50%"]]), False, True),  # a sign at the end has no boundary behind it
        ("50%x", phrases([["50%"]]), True, True),
        ("$5", phrases([["$5"]]), False, True),
        ("3 x 4", phrases([["3 x 4"]]), True, True),
        ("a.c", phrases([["a.c"]]), True, True),
        ("abc", phrases([["a.c"]]), False, False),  # an alias is text, not a pattern
        ("", phrases([["12"]]), False, False),
    ],
)
def test_an_answer_is_right_by_each_rule_of_gta(
    answer: str, reference: Phrases, by_official: bool, by_sport: bool
) -> None:
    assert official(answer, reference) is by_official
    assert sport(answer, reference) is by_sport


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("17", "17", True),
        ("17.0", "17", True),
        ("$1,234", "1234", True),  # $, % and , are taken out of the answer
        ("12%", "12", True),
        ("17 mugs", "17", False),  # no number
        ("seventeen", "17", False),
        ("", "17", False),
        ("1,234", "1,234", True),  # the truth with a comma is a list, element by element
        ("1234", "1,234", False),
        ("apples, pears", "apples,pears", True),
        ("Apples;PEARS", "apples, pears", True),
        ("pears, apples", "apples, pears", False),  # in this order
        ("apples", "apples, pears", False),  # as many elements
        ("apples, pears,", "apples, pears", False),
        ("apple's, pears", "apples, pears", False),  # punctuation counts within a list
        ("3.0, $4", "3; 4", True),  # numbers within a list are compared as numbers
        ("sea gull", "Seagull", True),  # white space, case
        ("St. Petersburg!", "st petersburg", True),  # and punctuation do not count
        ("Peters burg", "Petersburgs", False),
        ("naïve", "naive", False),
        ("None", "none", True),
        ("anything", "infinity", False),  # the deviation: what is no number equals none
    ],
)
def test_an_answer_is_right_by_gaias_rule(answer: str, truth: str, right: bool) -> None:
    assert is_right(answer, truth) is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think.\nFINAL ANSWER: 17", "17"),
        ("Final answer : 3, 4 ", "3, 4"),
        ("FINAL ANSWER: 1\nNo: FINAL ANSWER: 2\n", "2"),
        ("17", "17"),
        ("FINAL ANSWER:", ""),
    ],
)
def test_gaias_final_answer_follows_the_last_mark(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_matched_tools_are_the_longest_common_subsequence() -> None:
    assert matched_tools(["OCR", "Calculator"], ["OCR", "Calculator"]) == 2
    assert matched_tools(["GoogleSearch", "OCR", "OCR", "Calculator"], ["OCR", "Calculator"]) == 2  # more is no harm
    assert matched_tools(["Calculator", "OCR"], ["OCR", "Calculator"]) == 1  # in this order
    assert matched_tools([], ["OCR"]) == matched_tools(["OCR"], []) == 0
    draw = random.Random(1)
    for _ in range(200):
        called = [draw.choice("abc") for _ in range(draw.randrange(7))]
        wanted = [draw.choice("abc") for _ in range(draw.randrange(5))]
        subsequences = {s for n in range(len(called) + 1) for s in itertools.combinations(called, n)}
        parts = (s for n in range(len(wanted), -1, -1) for s in itertools.combinations(wanted, n))
        assert matched_tools(called, wanted) == next(len(part) for part in parts if part in subsequences)
