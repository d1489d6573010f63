"""What the practice dummy can do, per family and role: `python -m examples.shop.probe [--model DIR]`.

Greedy success on the held-out tasks; at temperature 1, success within five tries and the share of right
actions where the taught errors compete; the critic's accuracy and that of its confident picks; the share
of the writer's answers that are new tasks of a known family.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from nightschool_learner.prompts import FIRST, SeedView, parse_written_task

from examples.shop.demonstrations import CORRUPTED, Step, right_steps, slip, taught_error
from examples.shop.dummy import MODEL, Dummy, first_logprobs, load, sample
from examples.shop.families import FAMILIES, WORDINGS, Task, make_task
from examples.shop.held_out import EACH, held_out
from examples.shop.lessons import SEEDS_SHOWN, Lesson, writer_lesson
from examples.shop.rollouts import Episode, critic_prompt, explore, run_all

METHOD_SETTINGS = ((0.7, 0.8), *((1.2, 0.95),) * 4)
"""Temperature and top-p of each of the five candidates."""


def greedy(dummy: Dummy, tasks: Sequence[Task]) -> dict[str, float]:
    """Share solved per family, and of "all"."""
    return _shares([(episode.task.family, episode.solved) for episode in run_all(dummy, tasks)])


def sampled(dummy: Dummy, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """At temperature 1: solved on one try, within five, and right at the step where a taught error competes."""
    tries = [run_all(dummy, tasks, temperature=1.0) for _ in range(5)]
    at_error: list[tuple[str, bool]] = []
    for episodes in tries:
        for episode in episodes:
            right = right_steps(episode.task)
            place = next((i for i in range(len(right)) if taught_error(episode.task, i)), None)
            if place is not None and tuple(episode.steps[:place]) == right[:place] and len(episode.steps) > place:
                at_error.append((episode.task.family, episode.steps[place].action == right[place].action))
    return {
        "pass@1": _shares([(episode.task.family, episode.solved) for episodes in tries for episode in episodes]),
        "pass@5": _shares([(same[0].task.family, any(e.solved for e in same)) for same in zip(*tries, strict=True)]),
        "right at the taught error": _shares(at_error),
    }


def verdicts(dummy: Dummy, tasks: Sequence[Task], rng: random.Random) -> dict[str, dict[str, float]]:
    """The critic's accuracy per family: right step against the taught error, and against slips."""
    asked: list[tuple[str, str, bool]] = []
    prompts: list[Lesson] = []
    for task in tasks:
        right = right_steps(task)
        for place, step in enumerate(right):
            rivals = {"slip": slip(task, place, rng), "taught error": taught_error(task, place)}
            for kind, rival in rivals.items():
                if rival is None:
                    continue
                right_first = rng.random() < 0.5
                pair = (step, rival) if right_first else (rival, step)
                prompts.append(critic_prompt(Episode(task, list(right[:place])), *pair))
                asked.append((kind, task.family, right_first))
    says_first = first_logprobs(dummy, prompts, (FIRST, "B")).diff(dim=1)[:, 0] < 0
    hits: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for (kind, family, right_first), says in zip(asked, says_first.tolist(), strict=True):
        hits[kind].append((family, says == right_first))
    return {kind: _shares(rows) for kind, rows in hits.items()}


def picks(dummy: Dummy, tasks: Sequence[Task], margin: float) -> dict[str, dict[str, float]]:
    """In exploration: how often there is a choice, how often the critic is sure, and how often it is then right."""
    has_choice, sure, right = [], [], []
    for choice in explore(dummy, tasks, settings=METHOD_SETTINGS):
        family = choice.before.task.family
        has_choice.append((family, len(choice.candidates) > 1))
        if len(choice.candidates) > 1:
            winner = choice.winner(margin)
            sure.append((family, winner is not None))
            if winner is not None:
                right.append((family, is_right_step(choice.before, choice.candidates[winner])))
    return {"has rivals": _shares(has_choice), "sure": _shares(sure), "right when sure": _shares(right)}


def is_right_step(before: Episode, step: Step) -> bool:
    """Whether `step` is the right one after the right steps; after other ones, whether it is the right answer."""
    right = right_steps(before.task)
    if tuple(before.steps) == right[: len(before.steps)] and len(before.steps) < len(right):
        return step.action == right[len(before.steps)].action
    return not step.observation and before.task.is_solved_by(step.action)


def written(dummy: Dummy, count: int, rng: random.Random) -> dict[str, float]:
    """The share of the writer's answers that parse, belong to a known family, and are not one of the seeds."""
    seeds = [[make_task(rng.choice(FAMILIES), "traffic", rng) for _ in range(SEEDS_SHOWN)] for _ in range(count)]
    prompts = []
    for tasks in seeds:
        lesson = writer_lesson(tasks, rng)
        prompts.append(Lesson(lesson.messages[:-1], (), lesson.pictures))
    tally: dict[str, float] = defaultdict(float)
    new: set[str] = set()
    for tasks, answer in zip(seeds, sample(dummy, prompts, temperature=1.0), strict=True):
        views = [SeedView(task.prompt, ("x",) if task.picture else ()) for task in tasks]
        try:
            task = parse_written_task(answer, views)
        except ValueError:
            continue
        tally["parses"] += 1 / count
        family = family_of(task.prompt)
        fits = family is not None and (task.image_of is None or tasks[task.image_of].family == family)
        tally["solvable"] += fits / count
        if fits and all(task.prompt != seed.prompt for seed in tasks) and task.prompt not in new:
            new.add(task.prompt)
            tally["new"] += 1 / count
    return dict(tally)


def family_of(prompt: str) -> str | None:
    """The family whose wording `prompt` follows."""
    return next((family for family, pattern in _PATTERNS.items() if pattern.fullmatch(prompt)), None)


def _pattern(wordings: Sequence[str]) -> re.Pattern[str]:
    slots = {"name": "[A-Z][a-z]+", "a": "[0-9]+", "b": "[0-9]+", "q": "[0-9]+", "item": "[a-z]+ [a-z]+"}
    slots["shape"] = "circle|square|triangle"
    sources = [
        re.sub(r"\\\{(\w+)\\\}", lambda match: f"(?:{slots[match[1]]})", re.escape(wording)) for wording in wordings
    ]
    return re.compile("|".join(sources))


_PATTERNS = {family: _pattern(wordings) for family, wordings in WORDINGS.items()}


def _shares(rows: Sequence[tuple[str, bool]]) -> dict[str, float]:
    hits: dict[str, list[bool]] = defaultdict(list)
    for family, hit in rows:
        hits[family].append(hit)
        hits["all"].append(hit)
    return {family: round(sum(values) / len(values), 3) for family, values in hits.items()}


def probe(dummy: Dummy, *, each: int, quick: bool) -> dict[str, object]:
    """Every figure, by name."""
    rng = random.Random("probe")
    tasks = held_out(each)
    few = [task for at, task in enumerate(tasks) if at % 4 == 0]
    figures: dict[str, object] = {"greedy": greedy(dummy, tasks)}
    figures |= sampled(dummy, [task for task in (few if quick else tasks) if task.family in CORRUPTED])
    figures |= {
        f"critic against {kind}": value for kind, value in verdicts(dummy, few if quick else tasks, rng).items()
    }
    figures["writer"] = written(dummy, 64 if quick else 200, rng)
    if not quick:
        figures |= {f"picks: {name}": value for name, value in picks(dummy, few, 1.0).items()}
    return figures


def main() -> None:
    """Read the command line and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--each", type=int, default=EACH)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    figures = probe(load(options.model), each=options.each, quick=options.quick)
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    print(f"took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
