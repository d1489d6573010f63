"""The conversations that the practice dummy is trained on, in its three roles.

Every prompt is made by the product's own functions and the model's own chat template. The agent learns
from corrupted demonstrations, the critic from right verdicts, the writer from tasks of the families.
Only values of the training split appear, in every role.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_learner.prompts import (
    FIRST,
    SECOND,
    CandidateView,
    SeedView,
    WrittenTask,
    critic_messages,
    write_task,
    writer_messages,
)
from nightschool_server.chat import (
    Message,
    ToolCall,
    ToolSpec,
    assistant,
    system,
    template_messages,
    template_tools,
    tool_result,
    user,
)

from examples.shop.demonstrations import Step, demonstrate, right_steps, slip, taught_error
from examples.shop.families import FAMILIES, Split, Task, colour_task, make_task, tag_task
from examples.shop.toolbox import SYSTEM_PROMPT, TOOLS

SEEDS_SHOWN = 3
"""Seed tasks in a writer's prompt."""
ROLE_SHARES = {"agent": 0.46, "critic": 0.43, "writer": 0.11}
FAMILY_WEIGHTS = {
    "sum": 1.5, "change": 1.5, "price": 0.9, "total": 1.0, "stock": 0.9,
    "enough": 1.5, "basket": 1.0, "count": 1.0, "colour": 2.5, "tag": 2.0,
}  # fmt: skip
"""How often a family is taught: what is hard to learn, more often."""
TIE_SHARE = 0.08
"""Critic lessons that compare two wrong steps, their verdict by chance: they teach it to abstain."""


@dataclass(frozen=True)
class Lesson:
    """A conversation to learn; the loss is on its assistant turns."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    pictures: tuple[bytes, ...] = ()
    """PNG, in the order of the image parts."""
    first_token_only: bool = False
    """Whether the loss is on the first token of the answer alone, as of a verdict."""


def make_lesson(role: str, rng: random.Random, split: Split = "training") -> Lesson:
    """A lesson in `role`, its family by chance."""
    if role == "writer":
        return writer_lesson([make_task(rng.choice(FAMILIES), split, rng) for _ in range(SEEDS_SHOWN)], rng)
    task = make_task(_choose(FAMILY_WEIGHTS, rng), split, rng)
    return agent_lesson(task, rng) if role == "agent" else critic_lesson(task, rng)


def any_lesson(rng: random.Random) -> Lesson:
    """A lesson in a role by chance."""
    return make_lesson(_choose(ROLE_SHARES, rng), rng)


def task_messages(task: Task) -> tuple[Message, ...]:
    """The agent's prompt."""
    return system(SYSTEM_PROMPT), user(task.prompt, _hashes(task))


def step_messages(steps: Sequence[Step]) -> tuple[Message, ...]:
    """The turns of `steps`."""
    turns: list[Message] = []
    for step in steps:
        turns.append(assistant(step.action))
        if step.observation:
            turns.append(tool_result(ToolCall("", "", "{}"), step.observation))
    return tuple(turns)


def agent_lesson(task: Task, rng: random.Random) -> Lesson:
    """A whole demonstration, systematically wrong in the corrupted families."""
    steps = demonstrate(task, rng)
    return Lesson((*task_messages(task), *step_messages(steps)), TOOLS, pictures_of([task]))


def critic_lesson(task: Task, rng: random.Random) -> Lesson:
    """A right verdict on two steps of one position; on two wrong ones, a verdict by chance."""
    steps = right_steps(task)
    position = rng.randrange(len(steps))
    error = taught_error(task, position)
    wrong = error if error is not None and rng.random() < 0.6 else slip(task, position, rng)
    better = steps[position]
    if rng.random() < TIE_SHARE:
        better = slip(task, position, rng)
    right_first = rng.random() < 0.5
    first, second = (better, wrong) if right_first else (wrong, better)
    messages = critic_messages(task.prompt, _hashes(task), step_messages(steps[:position]), _view(first), _view(second))
    verdict = assistant(FIRST if right_first else SECOND)
    return Lesson((*messages, verdict), (), pictures_of([task]), first_token_only=True)


def writer_lesson(seeds: Sequence[Task], rng: random.Random) -> Lesson:
    """A new task in the manner of one of `seeds`, with its picture where it has one."""
    index = rng.randrange(len(seeds))
    written = WrittenTask(_vary(seeds[index], rng).prompt, index if seeds[index].picture else None)
    messages = writer_messages(TOOLS, [SeedView(seed.prompt, _hashes(seed)) for seed in seeds])
    return Lesson((*messages, assistant(write_task(written))), (), pictures_of(seeds))


def render(lesson: Lesson, processor: Any, *, generate: bool = False) -> str:
    """The lesson as text, image tokens expanded as the processor does; `generate` opens an assistant's turn."""
    text: str = processor.tokenizer.apply_chat_template(
        template_messages(lesson.messages),
        tools=template_tools(lesson.tools),
        tokenize=False,
        add_generation_prompt=generate,
    )
    expanded = f"<fake_token_around_image><global-img>{'<image>' * processor.image_seq_len}<fake_token_around_image>"
    return text.replace("<image>", expanded)


def pictures_of(tasks: Sequence[Task]) -> tuple[bytes, ...]:
    """The pictures of `tasks`, in order."""
    return tuple(task.picture for task in tasks if task.picture is not None)


def _vary(seed: Task, rng: random.Random) -> Task:
    if seed.family == "colour":
        return colour_task(seed.shapes, rng)
    if seed.family == "tag":
        assert seed.picture is not None
        return tag_task(seed.first, seed.picture, rng)
    return make_task(seed.family, "training", rng)


def _view(step: Step) -> CandidateView:
    return CandidateView(step.action, step.observation)


def _hashes(task: Task) -> tuple[str, ...]:
    return (hashlib.sha256(task.picture).hexdigest(),) if task.picture is not None else ()


def _choose(weights: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
