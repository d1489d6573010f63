"""Critique: which of a step's candidates won, and whether anybody can be sure of it.

Facts decide first: a candidate that failed loses to one that ran, and nobody is asked. Those that ran meet in duels
(`panel.py` says who decides one). A pick must win its duel with every rival; anything less is an abstention: the
trajectory goes on from a fallback, and the step makes no pair. A critic's failure is never a preference.

Owns the `Critic` seam, what a duel of two orders comes to, and `choose`. The critics are in `critics.py`; rows belong
to `comparisons.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nightschool_server.chat import Message

from nightschool_learner.prompts import CandidateView

Winner = Literal["first", "second", "invalid"]
PickedBy = Literal["facts", "critic", "agreed", "fallback"]
Abstention = Literal[
    "", "malformed", "margin", "disagreement", "intransitive", "all_failed", "budget", "unavailable", "veto", "silent"
]
"""Why nobody won; `silent`: no component had an opinion."""


@dataclass(frozen=True)
class Context:
    """What the critic knows beside the two candidates."""

    task: str
    images: tuple[str, ...]
    """The task's pictures, by sha256."""
    history: tuple[Message, ...]
    """What came after the task's own message."""
    pixels: Mapping[str, bytes] = field(default_factory=dict, compare=False)
    """Encoded bytes of images that are not blobs of the home, by sha256."""


@dataclass(frozen=True)
class Verdict:
    """One comparison in one order."""

    winner: Winner
    """`invalid` where there was no answer, or one that could not be read."""
    margin_nats: float
    """log p(first) - log p(second); in favour of `first`."""
    raw: str
    """The critic's answer, verbatim; the first one where there were several."""
    prompt_tokens: int
    why: Abstention = ""
    """Of an invalid one: `malformed` (empty means that too), `budget` or `unavailable`."""
    rubric: str = ""
    """Version and digest of the wording, `step-1:0a1b...`."""
    num_votes: int = 1
    """Answers behind it."""
    num_cached: int = 0
    """How many of them were known from an earlier comparison of the same content."""
    completion_tokens: int = 0

    @property
    def won_by_nats(self) -> float:
        """The margin in favour of the winner; negative where the verdict contradicts its own odds."""
        return self.margin_nats if self.winner == "first" else -self.margin_nats


class Critic(Protocol):
    """Compares two candidates in one order."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        """Say which step is better. An answer that cannot be read is a Verdict `invalid`, not an error."""
        ...


@dataclass(frozen=True)
class Contender:
    """A candidate as `choose` sees it."""

    position: int
    num_samples: int
    """How many samples said this."""
    logprob: float
    """Of its tokens, untempered: breaks ties of the fallback."""
    failed: bool
    """Whether a fact speaks against it."""


@dataclass(frozen=True)
class Duel:
    """Two candidates that ran, and which of them is better."""

    winner: int | None
    """A position; None where nobody can be sure."""
    why: Abstention = ""
    """Why there is no winner."""
    margin: float = 0.0
    """By how much it won, in the unit of what decided: nats for judge and consistency."""
    component: str = "judge"
    """What decided, or vetoed."""


@dataclass(frozen=True)
class Choice:
    """The outcome of a step."""

    picked: int
    """Position of the candidate that the trajectory continues from."""
    picked_by: PickedBy
    """`facts`, `critic`: decided. `agreed`: there was one action only. `fallback`: nobody was sure."""
    abstention: Abstention = ""
    """Why it is a fallback."""


Compare = Callable[[int, int], Awaitable[Verdict]]
"""Compares the candidates at two positions, the first one shown first."""

Meet = Callable[[int, int], Awaitable[Duel]]
"""The duel of the candidates at two positions, whichever is named first."""


async def choose(contenders: Sequence[Contender], meet: Meet) -> Choice:
    """Pick the step's winner, by facts where they suffice, else by duels, else the most sampled.

    Asks for as few duels as a sure pick needs: a candidate that did not win one of its duels cannot win the step, so it
    is met again only by a pick that has yet to beat it.
    """
    ran = [c for c in contenders if not c.failed]
    if not ran:
        return Choice(most_sampled(contenders), "fallback", "all_failed")
    if len(ran) == 1:
        return Choice(ran[0].position, "facts" if len(contenders) > 1 else "agreed")
    return await _tournament(ran, meet)


def most_sampled(contenders: Sequence[Contender]) -> int:
    """Position of the action that most samples agree on; the likelier one where counts are equal."""
    return max(contenders, key=lambda c: (c.num_samples, c.logprob)).position


async def _tournament(ran: Sequence[Contender], meet: Meet) -> Choice:
    order = sorted(ran, key=lambda c: (-c.num_samples, c.position))
    beaten: dict[int, set[int]] = {c.position: set() for c in order}
    champion: int | None = None
    abstention: Abstention = "margin"
    for position in (c.position for c in order):
        if champion is None:
            champion = position
            continue
        duel = await meet(champion, position)
        if duel.winner is None:
            champion, abstention = None, duel.why
        else:
            beaten[duel.winner].add(position if duel.winner == champion else champion)
            champion = duel.winner
    if champion is None:
        return Choice(most_sampled(ran), "fallback", abstention)
    for rival in (c.position for c in order):
        if rival == champion or rival in beaten[champion]:
            continue
        duel = await meet(champion, rival)
        if duel.winner != champion:
            return Choice(most_sampled(ran), "fallback", duel.why or "intransitive")
    return Choice(champion, "critic")


async def in_both_orders(a: int, b: int, compare: Compare, margin_nats: float) -> Duel:
    """The duel of `a` and `b`: one that wins in both orders by `margin_nats`, or why there is none.

    The second order is not paid for where the first is no verdict already.
    """
    forward = await compare(a, b)
    if why := _no_verdict(forward, margin_nats):
        return Duel(None, why)
    backward = await compare(b, a)
    if why := _no_verdict(backward, margin_nats):
        return Duel(None, why)
    if forward.winner == backward.winner:
        return Duel(None, "disagreement")
    winner = a if forward.winner == "first" else b
    return Duel(winner, margin=min(forward.won_by_nats, backward.won_by_nats))


def _no_verdict(verdict: Verdict, margin_nats: float) -> Abstention:
    if verdict.winner == "invalid":
        return verdict.why or "malformed"
    return "margin" if verdict.won_by_nats < margin_nats else ""
