"""Live requests to the shop, as its customers would send them, with the answers that they know.

Seeded and endless; disjoint from the held-out tasks and from what the model was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from examples.shop.families import FAMILIES, Task, make_task


@dataclass(frozen=True)
class Request:
    """One request and what its sender knows."""

    task: Task

    @property
    def prompt(self) -> str:
        """What the customer writes."""
        return self.task.prompt

    @property
    def images(self) -> tuple[bytes, ...]:
        """PNG."""
        return () if self.task.picture is None else (self.task.picture,)

    @property
    def family(self) -> str:
        """The task's family."""
        return self.task.family

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.task.answer

    def liked(self, answer: str) -> bool:
        """Whether the customer would give a thumb up for `answer`."""
        return self.task.is_solved_by(answer)


def traffic(seed: int) -> Iterator[Request]:
    """Requests without end, no two alike, every family as often as the others."""
    rng = random.Random(f"traffic {seed}")
    sent: set[tuple[str, bytes | None]] = set()
    while True:
        for family in rng.sample(FAMILIES, len(FAMILIES)):
            task = make_task(family, "traffic", rng)
            if (task.prompt, task.picture) not in sent:
                sent.add((task.prompt, task.picture))
                yield Request(task)
