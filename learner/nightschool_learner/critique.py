"""Critique: which of a step's candidates won, and whether anybody can be sure of it.

Facts decide first: a candidate that failed loses to one that ran, and no critic is asked. Among those
that ran, a critic compares two at a time in both orders. A pick must beat every rival in both orders
by a margin; anything less is an abstention: the trajectory goes on from a fallback, and the step makes
no pair. A critic's failure is never a preference.

Owns the `Critic` seam and `choose`. The critics are in `critics.py`; rows and the cache of
comparisons belong to `explore.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nightschool_server.chat import Message

from nightschool_learner.prompts import CandidateView

Winner = Literal["first", "second", "invalid"]
PickedBy = Literal["facts", "critic", "agreed", "fallback"]
Abstention = Literal["", "malformed", "margin", "disagreement", "intransitive", "all_failed"]


@dataclass(frozen=True)
class Context:
    """What the critic knows beside the two candidates."""

    task: str
    images: tuple[str, ...]
    """The task's pictures, by sha256."""
    history: tuple[Message, ...]
    """What came after the task's own message."""


@dataclass(frozen=True)
class Verdict:
    """One comparison in one order."""

    winner: Winner
    """`invalid` where the critic's answer could not be read."""
    margin_nats: float
    """log p(first) - log p(second); in favour of `first`."""
    raw: str
    """The critic's answer, verbatim."""
    prompt_tokens: int

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
class Choice:
    """The outcome of a step."""

    picked: int
    """Position of the candidate that the trajectory continues from."""
    picked_by: PickedBy
    """`facts`, `critic`: decided. `agreed`: there was one action only. `fallback`: the critic abstained."""
    abstention: Abstention = ""
    """Why it is a fallback."""


Compare = Callable[[int, int], Awaitable[Verdict]]
"""Compares the candidates at two positions, the first one shown first."""


async def choose(contenders: Sequence[Contender], compare: Compare, margin_nats: float) -> Choice:
    """Pick the step's winner, by facts where they suffice, else by the critic, else the most sampled.

    Asks for as few comparisons as a sure pick needs: a candidate that did not win one of its comparisons
    cannot win the step, so it is compared again only by a pick that has yet to beat it.
    """
    ran = [c for c in contenders if not c.failed]
    if not ran:
        return Choice(most_sampled(contenders), "fallback", "all_failed")
    if len(ran) == 1:
        return Choice(ran[0].position, "facts" if len(contenders) > 1 else "agreed")
    return await _ask(ran, compare, margin_nats)


def most_sampled(contenders: Sequence[Contender]) -> int:
    """Position of the action that most samples agree on; the likelier one where counts are equal."""
    return max(contenders, key=lambda c: (c.num_samples, c.logprob)).position


async def _ask(ran: Sequence[Contender], compare: Compare, margin_nats: float) -> Choice:
    order = sorted(ran, key=lambda c: (-c.num_samples, c.position))
    beaten: dict[int, set[int]] = {c.position: set() for c in order}
    champion: int | None = None
    abstention: Abstention = "margin"
    for position in (c.position for c in order):
        if champion is None:
            champion = position
            continue
        winner, why = await in_both_orders(champion, position, compare, margin_nats)
        if winner is None:
            champion, abstention = None, why
        else:
            beaten[winner].add(position if winner == champion else champion)
            champion = winner
    if champion is None:
        return Choice(most_sampled(ran), "fallback", abstention)
    for rival in (c.position for c in order):
        if rival == champion or rival in beaten[champion]:
            continue
        winner, why = await in_both_orders(champion, rival, compare, margin_nats)
        if winner != champion:
            return Choice(most_sampled(ran), "fallback", why or "intransitive")
    return Choice(champion, "critic")


async def in_both_orders(a: int, b: int, compare: Compare, margin_nats: float) -> tuple[int | None, Abstention]:
    """The one of `a` and `b` that wins in both orders, or None and why there is none.

    The second order is not paid for where the first is no verdict already.
    """
    forward = await compare(a, b)
    if why := _no_verdict(forward, margin_nats):
        return None, why
    backward = await compare(b, a)
    if why := _no_verdict(backward, margin_nats):
        return None, why
    if forward.winner == backward.winner:
        return None, "disagreement"
    return (a if forward.winner == "first" else b), ""


def margin_over(rival: int, picked: int, verdicts: Mapping[tuple[int, int], Verdict]) -> float | None:
    """The smaller of the two margins by which `picked` beat `rival`, or None where it did not in both orders."""
    forward, backward = verdicts.get((picked, rival)), verdicts.get((rival, picked))
    if forward is None or backward is None or forward.winner != "first" or backward.winner != "second":
        return None
    return min(forward.margin_nats, -backward.margin_nats)


def _no_verdict(verdict: Verdict, margin_nats: float) -> Abstention:
    if verdict.winner == "invalid":
        return "malformed"
    return "margin" if verdict.won_by_nats < margin_nats else ""
