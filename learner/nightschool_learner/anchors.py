"""Anchors: steps on which every candidate agreed, so that training keeps what needs no change.

Pairs come from steps with a choice, and those are the steps that go wrong: trained on alone, what they teach
("minus, not plus") spills over to the tasks that went well. An anchor is the prompt and the answer of a step
with one action only, in a rollout that ended with an answer; the trainer adds its NLL to the loss, and nothing
is preferred or rejected by it.

A common error is agreed on now and then by chance, and must not be held fast: what the model gives less than a
minimum probability is no anchor, though all samples said it.

What takes turns decides which anchors are many. By tool, every final answer is of one kind: the answer after a look-up,
to which pairs like "do not stop after the first look-up" spill over, shares its turns with all other answers. By step,
it has turns of its own.

Owns the selection. The trainer's file is `pair_export.py`, the loss `trainer_exact.py`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from nightschool_server.agent.formats import ActionFormat
from nightschool_server.chat import ToolCall, messages_from_json
from nightschool_server.config.practice import PairsConfig

from nightschool_learner.practice_records import DecidedStep


def select_anchors(
    steps: Sequence[DecidedStep], num_anchors: int, *, config: PairsConfig, seed: int, action_format: ActionFormat
) -> tuple[DecidedStep, ...]:
    """At most `num_anchors` of `steps` that are sound, each conversation once, the kinds of `anchor_turns` by turns.

    Rounds over the tools that the steps call (final answers count as one tool), or over these and the tool of the step
    before, keep the rare ones in.
    """
    supply = list(
        {step.step.history: step for step in steps if _is_sound(step, config.min_anchor_probability)}.values()
    )
    random.Random(seed).shuffle(supply)
    drawn: Counter[tuple[str, ...]] = Counter()
    turns = []
    for step in supply:
        before = _before(step, action_format) if config.anchor_turns == "step" else ()
        kind = (*before, action_format.tool_of(step.candidates[0].text))
        turns.append((drawn[kind], step))
        drawn[kind] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: the shuffle decides within a round
    return tuple(step for _, step in turns[:num_anchors])


def _before(step: DecidedStep, action_format: ActionFormat) -> tuple[str, ...]:
    """The tool that the step before called first; nothing where there is none."""
    spoken = [message for message in messages_from_json(step.step.history) if message.role == "assistant"]
    if not spoken:
        return ()
    called = next((part.name for part in spoken[-1].parts if isinstance(part, ToolCall)), None)
    return (action_format.tool_of(spoken[-1].text) if called is None else called,)


def _is_sound(step: DecidedStep, min_probability: float) -> bool:
    if len(step.candidates) != 1 or step.candidates[0].failure:
        return False
    return math.exp(step.candidates[0].logprob) >= min_probability
