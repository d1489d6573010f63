"""Samples of a step as actions: what makes two samples the same, and what each one did.

Owns the merging of equal actions, pure functions over sampled text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nightschool_server.agent.formats import ActionFormat

from nightschool_learner.sampling import Sample


@dataclass(frozen=True)
class Action:
    """A distinct action and how many samples asked for it."""

    sample: Sample
    """The first that asked for it."""
    num_samples: int


def merge(samples: Sequence[Sample], action_format: ActionFormat) -> list[Action]:
    """The distinct actions of a step, in the order in which they were first sampled."""
    counts: dict[str, int] = {}
    firsts: dict[str, Sample] = {}
    for sample in samples:
        key = action_format.key(sample.text)
        counts[key] = counts.get(key, 0) + 1
        firsts.setdefault(key, sample)
    return [Action(sample, counts[key]) for key, sample in firsts.items()]
