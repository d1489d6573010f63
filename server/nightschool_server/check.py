"""`nightschool check`: what is wrong with an application before it serves, and with the model for it.

Owns the order of the checks and those of the held-out tasks; tools are `tool_check.py`'s, what the model's chat
template makes of them is `template_check.py`'s. Changes nothing and starts no model. A fault would stop the start or
spoil every task; `no` is something that works less well than it could.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from nightschool_server.agent.formats import call_form
from nightschool_server.app import App, EvaluationTask, import_app
from nightschool_server.call_form_choice import with_call_form
from nightschool_server.config.config import Config
from nightschool_server.errors import AppError
from nightschool_server.evaluation_set import read_lines
from nightschool_server.findings import Finding, State
from nightschool_server.tool_check import examine_tools, near

MAX_SHOWN = 5
"""Faults of one kind that are spelled out; the rest are counted."""

NO_MODEL = "not given: name its folder with --model to check the chat template and the context"


def examine(config: Config) -> list[Finding]:
    """Every finding about the application that `config` names, in the order of a start."""
    config = with_call_form(config)
    try:
        app = import_app(config.app)
    except AppError as error:
        return [Finding("app", "", "fault", near(error))]
    tasks, evaluation = _evaluation(app, config)
    specs, tools = examine_tools(app, call_form(config.agent))
    found = [Finding("app", "", "ok", f"{config.app}: {app.name!r}, {len(specs)} tools")]
    found += [*_prompt(app), *tools, *evaluation]
    if not config.engine.model:
        return [*found, Finding("model", "", "no", NO_MODEL)]
    from nightschool_server.template_check import examine_model

    return [*found, *examine_model(app, specs, config, has_images=any(task.images for task in tasks))]


def _prompt(app: App) -> Iterator[Finding]:
    if not app.system_prompt.strip():
        yield Finding("app", "prompt", "no", "system_prompt is empty: say who the model is and how it must answer")


def _evaluation(app: App, config: Config) -> tuple[list[EvaluationTask], list[Finding]]:
    """The tasks that can be read, and what is to be said of the file."""
    if app.evaluation is None:
        text = "none: nothing is ever promoted; give App(evaluation=Path(...)) a file of held-out tasks"
        return [], [Finding("evaluation", "", "no", text)]
    path = Path(app.evaluation)
    try:
        lines = list(read_lines(path))
    except AppError as error:
        return [], [Finding("evaluation", "", "fault", near(error))]
    faults = [near(task) for _, task in lines if isinstance(task, AppError)]
    tasks = {number: task for number, task in lines if not isinstance(task, AppError)}
    if faults:
        return list(tasks.values()), list(_shown("lines", faults, "fault"))
    if not tasks:
        return [], [Finding("evaluation", "", "fault", f"{near(path)} has no tasks: write one JSON object per line")]
    families = Counter(task.family for task in tasks.values())
    counts = ", ".join(f"{name} {count}" for name, count in sorted(families.items()))
    found = [Finding("evaluation", "", "ok", f"{near(path)}: {len(tasks)} tasks in {len(families)} families: {counts}")]
    found += [_number(len(tasks), config), *_repeated(tasks), *_images(tasks)]
    return list(tasks.values()), found


def _number(num_tasks: int, config: Config) -> Finding:
    needed, limit = config.learner.gate.min_n, config.learner.evaluate.max_tasks
    measured = min(num_tasks, limit) if limit else num_tasks
    if measured < needed:
        remedy = "write more, or lower it and accept that only large differences can be proven"
        text = f"{measured} tasks are measured, the gate needs {needed} (learner.gate.min_n), so nothing is promoted"
        return Finding("evaluation", "number", "no", f"{text}: {remedy}")
    return Finding("evaluation", "number", "ok", f"{measured} tasks are measured, the gate needs {needed}")


def _repeated(tasks: dict[int, EvaluationTask]) -> Iterator[Finding]:
    """Tasks that ask the same: one answer counts twice, or two answers cannot both be right."""
    first: dict[tuple[str, tuple[bytes, ...]], tuple[int, EvaluationTask]] = {}
    twice: list[str] = []
    contrary: list[str] = []
    for number, task in tasks.items():
        asked = (" ".join(task.prompt.split()).casefold(), tuple(image.read_bytes() for image in task.images))
        before, other = first.setdefault(asked, (number, task))
        if other is task:
            continue
        if other.answer == task.answer:
            twice.append(f"line {number} asks what line {before} asks: it counts twice, drop one")
        else:
            contrary.append(f"lines {before} and {number} ask the same and have different answers: mend one")
    yield from _shown("repeated", contrary, "fault")
    yield from _shown("repeated", twice, "no")


def _images(tasks: dict[int, EvaluationTask]) -> Iterator[Finding]:
    faults, num_images = [], 0
    for number, task in tasks.items():
        for path in task.images:
            num_images += 1
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                faults.append(f"line {number}: image {path.name} cannot be read ({error}): replace it")
    yield from _shown("images", faults, "fault")
    if num_images and not faults:
        yield Finding("evaluation", "images", "ok", f"{num_images} images can be read")


def _shown(name: str, texts: list[str], state: State) -> Iterator[Finding]:
    for text in texts[:MAX_SHOWN]:
        yield Finding("evaluation", name, state, text)
    if len(texts) > MAX_SHOWN:
        yield Finding("evaluation", name, state, f"and {len(texts) - MAX_SHOWN} more of this kind")
