"""Episodes of the practice dummy in this process, many at a time: greedy, sampled, or explored with its critic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from nightschool_learner.prompts import FIRST, SECOND, CandidateView, critic_messages
from nightschool_server.agent.toolcalls import parse_answer

from examples.shop.demonstrations import Step
from examples.shop.dummy import Dummy, first_logprobs, sample
from examples.shop.families import Task
from examples.shop.lessons import Lesson, pictures_of, step_messages, task_messages
from examples.shop.toolbox import TOOLS, run_tool

MAX_STEPS = 5


@dataclass
class Episode:
    """A task being worked on."""

    task: Task
    steps: list[Step] = field(default_factory=list)
    basket: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether an answer was given or the limit reached."""
        return len(self.steps) >= MAX_STEPS or bool(self.steps and not self.steps[-1].observation)

    @property
    def solved(self) -> bool:
        """Whether the answer is right."""
        return bool(self.steps) and not self.steps[-1].observation and self.task.is_solved_by(self.steps[-1].action)

    @property
    def prompt(self) -> Lesson:
        """What the model is to continue."""
        return Lesson((*task_messages(self.task), *step_messages(self.steps)), TOOLS, pictures_of([self.task]))


def execute(action: str, basket: dict[str, int]) -> Step:
    """Run what `action` asks for on `basket`."""
    parsed = parse_answer(action)
    if parsed.error is not None:
        return Step(action, f"error: {parsed.error}")
    if not parsed.calls:
        return Step(action)
    return Step(action, "\n".join(run_tool(call.name, json.loads(call.arguments), basket) for call in parsed.calls))


def run_all(dummy: Dummy, tasks: Sequence[Task], *, temperature: float = 0.0, top_p: float = 1.0) -> list[Episode]:
    """One episode for each task."""
    episodes = [Episode(task) for task in tasks]
    while active := [episode for episode in episodes if not episode.done]:
        answers = sample(dummy, [episode.prompt for episode in active], temperature=temperature, top_p=top_p)
        for episode, action in zip(active, answers, strict=True):
            episode.steps.append(execute(action, episode.basket))
    return episodes


@dataclass(frozen=True)
class Choice:
    """The candidates of one step and what the critic made of them."""

    before: Episode
    """The episode up to this step, a copy."""
    candidates: tuple[Step, ...]
    margins: dict[tuple[int, int], float]
    """For candidates i and j, by how many nats i wins, the smaller of the two orders; negative: it does not."""

    def winner(self, margin: float) -> int | None:
        """The candidate that beats each other one in both orders by `margin`."""
        return next((i for i in range(len(self.candidates)) if self.beats_all(i, margin)), None)

    def beats_all(self, i: int, margin: float) -> bool:
        """Whether candidate `i` beats each other one by `margin`."""
        return all(self.margins[i, j] >= margin for j in range(len(self.candidates)) if j != i)


def compare_many(dummy: Dummy, steps: Sequence[tuple[Episode, tuple[Step, ...]]]) -> list[Choice]:
    """Ask the critic about each pair of each step's candidates in both orders."""
    asked: list[tuple[int, int, int]] = []
    prompts: list[Lesson] = []
    for at, (episode, candidates) in enumerate(steps):
        for i, first in enumerate(candidates):
            for j, second in enumerate(candidates):
                if i != j:
                    asked.append((at, i, j))
                    prompts.append(critic_prompt(episode, first, second))
    lead = {}
    if prompts:
        logprobs = first_logprobs(dummy, prompts, (FIRST, SECOND))
        lead = dict(zip(asked, (logprobs[:, 0] - logprobs[:, 1]).tolist(), strict=True))
    choices = []
    for at, (episode, candidates) in enumerate(steps):
        pairs = [(i, j) for i in range(len(candidates)) for j in range(len(candidates)) if i != j]
        margins = {(i, j): min(lead[at, i, j], -lead[at, j, i]) for i, j in pairs}
        before = Episode(episode.task, list(episode.steps), dict(episode.basket))
        choices.append(Choice(before, candidates, margins))
    return choices


def critic_prompt(episode: Episode, first: Step, second: Step) -> Lesson:
    """The critic's prompt for two candidates."""
    pictures = pictures_of([episode.task])
    user = task_messages(episode.task)[1]
    views = (CandidateView(first.action, first.observation), CandidateView(second.action, second.observation))
    return Lesson(critic_messages(user.text, user.images, step_messages(episode.steps), *views), (), pictures)


def explore(dummy: Dummy, tasks: Sequence[Task], *, settings: Sequence[tuple[float, float]]) -> list[Choice]:
    """Try one candidate per (temperature, top_p) at each step and go on from the critic's best.

    Where the critic abstains the first candidate goes on. Candidates that fail are dropped before the critic.
    """
    episodes = [Episode(task) for task in tasks]
    choices: list[Choice] = []
    while active := [episode for episode in episodes if not episode.done]:
        tried: list[dict[str, Step]] = [{} for _ in active]
        for temperature, top_p in settings:
            answers = sample(dummy, [e.prompt for e in active], temperature=temperature, top_p=top_p)
            for episode, unique, action in zip(active, tried, answers, strict=True):
                step = execute(action, dict(episode.basket))
                if not step.observation.startswith("error"):
                    unique.setdefault(action, step)
        steps = [(e, tuple(unique.values())) for e, unique in zip(active, tried, strict=True)]
        for episode, choice in zip(active, compare_many(dummy, steps), strict=True):
            if not choice.candidates:
                episode.steps.append(Step("?"))
                continue
            choices.append(choice)
            best = choice.winner(0.0) or 0
            episode.steps.append(execute(choice.candidates[best].action, episode.basket))
    return choices
