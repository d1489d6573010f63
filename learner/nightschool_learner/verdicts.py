"""What a critic's answer says: a letter with the odds beside it, or a JSON object with a confidence.

Owns the two forms of an answer and their reading, pure functions over text. An answer in no form is unreadable, which
is never a preference. Scores are in nats, one for each candidate in the order in which they were shown; only their
differences mean something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from nightschool_server.engine import TopLogprob

MAX_MARGIN_NATS = 10.0
"""What a confidence of 1 counts as."""

Scores = tuple[float, ...]
"""Of each candidate, in the order shown."""


def json_format(letters: Sequence[str]) -> str:
    """How an endpoint that gives no odds is asked to answer."""
    choices = " or ".join(f'"{letter}"' for letter in letters)
    guess = f"{1 / len(letters):.2g}"
    return (
        f'Reply with one JSON object and nothing else: {{"better": {choices}, '
        f'"confidence": a number from {guess} (a guess) to 1 (certain)}}.'
    )


def read_odds(text: str, top: Sequence[TopLogprob], letters: Sequence[str]) -> Scores | None:
    """The log odds of each letter at the first token; None where the answer is no letter.

    A letter that is not among the likeliest tokens is taken to be as likely as the least of them, so
    the margin is never overstated.
    """
    if text.strip() not in letters or not top:
        return None
    floor = min(entry.logprob for entry in top)
    return tuple(_logprob_of(letter, top, floor) for letter in letters)


def read_json(text: str, letters: Sequence[str]) -> Scores | None:
    """The scores in an endpoint's JSON; None for anything else.

    A confidence of c in one of n candidates is taken as odds of c against an even share of 1 - c for each other one.
    """
    try:
        value = json.loads(unfenced(text))
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("better") not in letters:
        return None
    confidence = value.get("confidence")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        return None
    num_others = len(letters) - 1
    if not 1 / len(letters) - 0.01 <= confidence <= 1:
        return None
    margin = MAX_MARGIN_NATS
    if confidence < 1:
        margin = max(0.0, min(margin, math.log(confidence * num_others / (1 - confidence))))
    return tuple(margin if letter == value["better"] else 0.0 for letter in letters)


def best_of(scores: Scores) -> int:
    """Index of the highest score."""
    return max(range(len(scores)), key=scores.__getitem__)


def unfenced(text: str) -> str:
    """`text` without the Markdown fence that many models put around JSON."""
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text


def _logprob_of(letter: str, top: Sequence[TopLogprob], floor: float) -> float:
    """log of the summed odds of every token that reads `letter`, e.g. with and without a leading space."""
    found = [entry.logprob for entry in top if entry.token.strip() == letter]
    if not found:
        return floor
    highest = max(found)
    return highest + math.log(sum(math.exp(logprob - highest) for logprob in found))
