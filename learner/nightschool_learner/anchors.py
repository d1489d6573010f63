"""Anchors: steps on which every candidate agreed, so that training keeps what needs no change.

Pairs come from steps with a choice, and those are the steps that go wrong: trained on alone, what they teach
("minus, not plus") spills over to the tasks that went well. An anchor is the prompt and the answer of a step
with one action only, in a rollout that ended with an answer; the trainer adds its NLL to the loss, and nothing
is preferred or rejected by it.

A common error is agreed on now and then by chance, and must not be held fast: what the model gives less than a
minimum probability is no anchor, though all samples said it.

Owns the selection. The trainer's file is `pair_export.py`, the loss `trainer_exact.py`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from nightschool_server.agent.formats import ActionFormat

from nightschool_learner.practice_records import DecidedStep


def select_anchors(
    steps: Sequence[DecidedStep], num_anchors: int, *, min_probability: float, seed: int, action_format: ActionFormat
) -> tuple[DecidedStep, ...]:
    """At most `num_anchors` of `steps` that are sound, each conversation once, the tools by turns.

    `min_probability` is that of the whole answer under the untempered model. Rounds over the tools that the steps
    call (final answers count as one tool) keep the rare ones in.
    """
    supply = list({step.step.history: step for step in steps if _is_sound(step, min_probability)}.values())
    random.Random(seed).shuffle(supply)
    drawn: Counter[str] = Counter()
    turns = []
    for step in supply:
        tool = action_format.tool_of(step.candidates[0].text)
        turns.append((drawn[tool], step))
        drawn[tool] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: the shuffle decides within a round
    return tuple(step for _, step in turns[:num_anchors])


def _is_sound(step: DecidedStep, min_probability: float) -> bool:
    if len(step.candidates) != 1 or step.candidates[0].failure:
        return False
    return math.exp(step.candidates[0].logprob) >= min_probability
