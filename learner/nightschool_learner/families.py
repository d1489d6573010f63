"""Families of tasks: what makes two tasks of one kind, how well a kind is solved, and how much practice it deserves.

A family is the set of tools that a conversation called, and what it brought beside text: `add+look_up/text`,
`none/image`. Pure functions; the rows are `curriculum.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nightschool_server.chat import Message, ToolResult

T = TypeVar("T")

PRIOR_TASKS, PRIOR_RATE = 2.0, 0.5
"""What a family is taken for before anything is known of it, and how many tasks outweigh that."""
FADING = 0.5
"""Weight of a cycle against that of the cycle after it: adapters change."""


@dataclass(frozen=True)
class Family:
    """What a cycle, or several, found of a family."""

    name: str
    num_tasks: int
    """Practised or probed."""
    solve_rate: float
    num_pairs: int
    seen_at: float


def family_of(tools: Iterable[str], images: Collection[object], files: Collection[object]) -> str:
    """The family of a conversation that called `tools` and brought these."""
    brought = [kind for kind, parts in (("image", images), ("file", files)) if parts]
    return f"{'+'.join(sorted(set(tools))) or 'none'}/{'+'.join(brought) or 'text'}"


def tools_of(messages: Iterable[Message]) -> tuple[str, ...]:
    """The tools that gave something back, in order."""
    return tuple(
        part.name
        for message in messages
        for part in message.parts
        if isinstance(part, ToolResult) and part.name and not part.is_error
    )


def weight_of(family: Family | None, floor: float) -> float:
    """Of a seed of that family: 4 p (1 - p) of its solve rate, between `floor` and 1; 1 where nothing is known.

    Highest at one half: there samples differ most, and so does what can be learned from them.
    """
    if family is None:
        return 1.0
    return floor + (1 - floor) * 4 * family.solve_rate * (1 - family.solve_rate)


def draw(rng: random.Random, items: Sequence[T], weights: Sequence[float], num: int) -> list[T]:
    """`num` different items, one after the other with a chance in proportion to their weights.

    Efraimidis and Spirakis 2006: the items with the largest u^(1/w).
    """
    keys = [rng.random() ** (1 / weight) for weight in weights]
    order = sorted(range(len(items)), key=lambda i: keys[i], reverse=True)
    return [items[i] for i in order[:num]]


def merged(cycles: Sequence[Family]) -> Family:
    """What several cycles, newest first, found of one family: each with half the weight of the one after it."""
    weights = [family.num_tasks * FADING**age for age, family in enumerate(cycles)]
    solved = sum(weight * family.solve_rate for weight, family in zip(weights, cycles, strict=True))
    return Family(
        name=cycles[0].name,
        num_tasks=sum(family.num_tasks for family in cycles),
        solve_rate=(solved + PRIOR_TASKS * PRIOR_RATE) / (sum(weights) + PRIOR_TASKS),
        num_pairs=sum(family.num_pairs for family in cycles),
        seen_at=max(family.seen_at for family in cycles),
    )
