"""General ability: whether an adapter still knows text that has nothing to do with the application.

A few neutral passages ship with the learner. The negative log-likelihood of each, as the answer to a plain request, is
scored on the candidate, the incumbent and the base model through the server. What is learned from an application's
tasks should leave it nearly as it was; a rise says that the adapter paid for its success elsewhere. The base model is
what it is held against, so that small losses of many rounds add up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nightschool
from nightschool_server.chat import canonical_json

from nightschool_learner.parallel import together
from nightschool_learner.sampling import CALL_TIMEOUT_S, patiently

if TYPE_CHECKING:
    from nightschool_learner.stages import Cycle

BASE = "base"

PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Explain why leaves change colour in autumn.",
        "In summer a leaf is green because it holds a great deal of chlorophyll, which catches the light that the "
        "plant lives on. When the days grow short the plant stops replacing it. The green fades, and yellow and orange "
        "pigments that were there all the time come into view. Red is different: it is made anew from sugar that is "
        "left in the leaf, which is why a bright, cold autumn gives the strongest reds.",
    ),
    (
        "How do I boil an egg?",
        "Bring a small pot of water to a boil and lower the egg in with a spoon. Six minutes give a soft yolk, nine a "
        "firm one. Take the egg out and hold it under cold water for a minute, so that it stops cooking and is easier "
        "to peel. Older eggs peel better than fresh ones.",
    ),
    (
        "Write a short letter that asks a neighbour for a favour.",
        "Dear neighbour, we are away from Friday until the end of next week. Would you be so kind as to water the "
        "tomatoes on the balcony every second evening? The key is where it always is. Help yourself to whatever is "
        "ripe, and please tell us what we can bring you. With many thanks, from the second floor.",
    ),
    (
        "Write a Python function that says whether a word reads the same backwards.",
        "def is_palindrome(word: str) -> bool:\n"
        '    """Whether `word` reads the same backwards, case and spaces ignored."""\n'
        "    letters = [letter for letter in word.lower() if letter.isalnum()]\n"
        "    return letters == letters[::-1]",
    ),
    (
        "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
        "From 9:40 to 12:00 are two hours and twenty minutes. Five more minutes make two hours and twenty-five "
        "minutes, which is 145 minutes.",
    ),
)
"""A request and its answer."""

VERSION = hashlib.sha256(canonical_json(PASSAGES).encode()).hexdigest()[:12]
"""Names the passages; numbers of different versions do not compare."""


@dataclass(frozen=True)
class Ability:
    """Negative log-likelihood of the passages, nats a token."""

    version: str
    num_tokens: int
    base: float
    incumbent: float
    candidate: float

    @property
    def loss(self) -> float:
        """What the candidate knows less than the base model, nats a token; negative where it knows more."""
        return self.candidate - self.base


async def measure_ability(cycle: Cycle, candidate: str) -> Ability | None:
    """Score every passage on the three adapters; None where the model's context is too short for one.

    Raises what `patiently` raises.
    """
    names = (BASE, cycle.incumbent, candidate)
    try:
        found = {name: await _scores(cycle, name) for name in dict.fromkeys(names)}
    except nightschool.ContextOverflowError:
        return None
    base, incumbent, scored = ([s.tokens for s in found[name] if s.tokens is not None] for name in names)
    num_tokens = sum(len(tokens.ids) for tokens in base)
    return Ability(VERSION, num_tokens, *(_nats(tokens) / num_tokens for tokens in (base, incumbent, scored)))


async def _scores(cycle: Cycle, adapter: str) -> list[nightschool.Scores]:
    async def score(request: str, answer: str) -> nightschool.Scores:
        return await patiently(
            cycle,
            lambda: cycle.client.score(
                request,
                answer,
                adapter=adapter,
                priority=nightschool.Priority.PRACTICE,
                timeout_s=CALL_TIMEOUT_S,
            ),
        )

    return await together(*(score(request, answer) for request, answer in PASSAGES))


def _nats(passages: Sequence[nightschool.Tokens]) -> float:
    return -sum(sum(tokens.logprobs) for tokens in passages)
