"""Held-out tasks: what the gate measures on, and what neither training nor synthesis may see.

Owns the file format, its digest and the rule for a right answer. A file is JSON lines, one task each:

    {"id": "tag-001", "family": "tag", "prompt": "What do 3 cost?", "images": ["tag-001.png"], "answer": "36",
     "match": "number"}

`images`, and `files` for the workspace, are paths from the file's folder and may be left out; `match` is "number"
or "text" (default). Tasks that have no one right answer leave `answer` and `match` out, all of a file or none: then a
judge compares answers (`learner.gate.judge`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightschool_server.chat import canonical_json
from nightschool_server.errors import AppError

Match = Literal["number", "text"]

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?")
_KEYS = {"id": str, "family": str, "prompt": str, "images": list, "files": list, "answer": str, "match": str}
_REQUIRED = ("id", "family", "prompt")


@dataclass(frozen=True)
class EvaluationTask:
    """One held-out task, with its exact answer where it has one."""

    id: str
    family: str
    prompt: str
    answer: str = ""
    """Empty where a judge is to compare answers."""
    match: Match = "text"
    images: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """All held-out tasks of an application."""

    tasks: tuple[EvaluationTask, ...]
    digest: str
    """sha256 over every task and the bytes of its images and files; the order of the lines does not matter."""

    @property
    def is_judged(self) -> bool:
        """Whether the tasks have no answers, so that a judge must compare those of two adapters."""
        return not any(task.answer for task in self.tasks)


def read_evaluation(path: Path) -> EvaluationSet:
    """Read the file. Raises AppError with line, value and rule."""
    tasks: list[EvaluationTask] = []
    for _, task in read_lines(path):
        if isinstance(task, AppError):
            raise task
        tasks.append(task)
    without = [task.id for task in tasks if not task.answer]
    if 0 < len(without) < len(tasks):
        raise AppError(f"evaluation set {path}: {without[0]!r} has no 'answer', others have: give it to all or none")
    if not tasks:
        raise AppError(f"evaluation set {path} has no tasks: write one JSON object per line")
    return EvaluationSet(tuple(tasks), digest_of(tuple(tasks)))


def read_lines(path: Path) -> Iterator[tuple[int, EvaluationTask | AppError]]:
    """The number of every line that is not empty, and its task or what is wrong with it.

    Raises AppError where the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AppError(f"evaluation set {path}: it cannot be read: {error}") from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"evaluation set {path}, line {number}"
        try:
            task = _parse(line, path.parent, where)
            if task.id in seen:
                raise AppError(f"{where}: id {task.id!r} was used before: ids must differ")
        except AppError as error:
            yield number, error
        else:
            seen.add(task.id)
            yield number, task


def is_correct(task: EvaluationTask, answer: str) -> bool:
    """Whether `answer` is the task's.

    Numbers are compared as floats after `$`, `%`, `,`, spaces and a trailing period are taken away; texts
    without case, outer and repeated spaces and a trailing period. Nothing else is forgiven.
    """
    if task.match == "number":
        given, expected = _number(answer), _number(task.answer)
        return given is not None and expected is not None and math.isclose(given, expected, rel_tol=1e-9)
    return _text(answer) == _text(task.answer)


def _number(text: str) -> float | None:
    bare = re.sub(r"[$%,\s]", "", text).removesuffix(".").lower()
    return float(bare) if _NUMBER.fullmatch(bare) else None


def _text(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def _parse(line: str, folder: Path, where: str) -> EvaluationTask:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise AppError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise AppError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AppError(f"{where}: must be a JSON object")
    if unknown := sorted(set(value) - set(_KEYS)):
        raise AppError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in value:
            raise AppError(f"{where}: {key!r} is missing")
    for key, kind in _KEYS.items():
        if key in value and not isinstance(value[key], kind):
            raise AppError(f"{where}: {key!r} is {value[key]!r}; it must be a {kind.__name__}")
    match = value.get("match", "text")
    if match not in ("number", "text"):
        raise AppError(f"{where}: match {match!r} must be 'number' or 'text'")
    if "answer" not in value and "match" in value:
        raise AppError(f"{where}: 'match' says how an answer is compared, but there is no 'answer'")
    if value.get("answer", "given").strip() == "":
        raise AppError(f"{where}: 'answer' is empty: leave it out of every task where a judge is to compare answers")
    if match == "number" and _number(value["answer"]) is None:
        raise AppError(f"{where}: answer {value['answer']!r} is not a number, but match is 'number'")
    images, files = (_paths(folder, value.get(key, []), f"{where}: {key[:-1]}") for key in ("images", "files"))
    if len({path.name for path in files}) < len(files):
        raise AppError(f"{where}: two files have one name, but they lie in one workspace: rename one")
    return EvaluationTask(value["id"], value["family"], value["prompt"], value.get("answer", ""), match, images, files)


def _paths(folder: Path, names: list[Any], what: str) -> tuple[Path, ...]:
    for name in names:
        if not (folder / str(name)).is_file():
            raise AppError(f"{what} {str(name)!r} is not a file in {folder}")
    return tuple(folder / str(name) for name in names)


def digest_of(tasks: tuple[EvaluationTask, ...]) -> str:
    """sha256 over every task and the bytes of its images and files; their order does not matter."""
    rows = sorted(
        canonical_json(
            [t.id, t.family, t.prompt, t.answer, t.match]
            + [hashlib.sha256(image.read_bytes()).hexdigest() for image in t.images]
            + [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in t.files]
        )
        for t in tasks
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
