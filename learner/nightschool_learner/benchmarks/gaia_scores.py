"""GAIA's rule: is an answer equal to the one that is known, as a number, a list or a string.

Source: the leaderboard's public scorer (arXiv 2311.12983). Deviation: an answer that is no number never
equals one, where the scorer takes it for infinity. Pure.
"""

from __future__ import annotations

import re
import string

_MARK = re.compile(r"final answer\s*:", re.IGNORECASE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_right(answer: str, truth: str) -> bool:
    """Whether `answer` is `truth`; which of the three forms applies is the truth's to say.

    A number: equal as floats, after `$`, `%` and `,` are taken out of the answer. A list (the truth has a `,` or
    `;`): as many elements, each equal as a number where the truth's is one, else without white space and case.
    Anything else: equal without white space, ASCII punctuation and case.
    """
    if (number := _float(truth)) is not None:
        return _number(answer) == number
    if "," in truth or ";" in truth:
        wanted, given = re.split("[,;]", truth), re.split("[,;]", answer)
        return len(wanted) == len(given) and all(map(_is_element, given, wanted))
    return _bare(answer).translate(_NO_PUNCTUATION) == _bare(truth).translate(_NO_PUNCTUATION)


def final_answer(text: str) -> str:
    """What follows the last `FINAL ANSWER:`, or the whole text where there is none."""
    return _MARK.split(text)[-1].strip()


def _is_element(given: str, wanted: str) -> bool:
    number = _float(wanted)
    return _bare(given) == _bare(wanted) if number is None else _number(given) == number


def _number(text: str) -> float | None:
    return _float(re.sub("[$%,]", "", text))


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text).lower()
