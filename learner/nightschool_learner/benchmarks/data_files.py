"""Files of a data set's folder: found, read, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nightschool_learner.errors import BenchmarkError


def fault(path: Path, where: str, rule: str) -> BenchmarkError:
    """The refusal of something in a file."""
    return BenchmarkError(f"{path}{f', {where}' if where else ''}: {rule}")


def file_of(folder: Path, name: str, whose: str) -> Path:
    """A file that the data set must have. Raises BenchmarkError, with where it may be instead."""
    if not folder.is_dir():
        raise BenchmarkError(f"--data {folder} is no folder: give the one with {whose} {name}")
    path = folder / name
    if path.is_file():
        return path
    below = sorted(found.parent for found in folder.glob(f"**/{name}"))
    hint = f"did you mean {below[0]}?" if below else f"give the folder with {whose} {name}"
    raise BenchmarkError(f"--data {folder} has no {name}: {hint}")


def read_json(path: Path) -> Any:
    """The JSON document in a file. Raises BenchmarkError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read as JSON: {error}") from error


def file_within(folder: Path, name: str, path: Path, where: str) -> Path:
    """A file that a task names, from the data set's folder. Raises BenchmarkError."""
    found = folder / name
    if not found.resolve().is_relative_to(folder.resolve()):
        raise fault(path, where, f"its file {name!r} lies outside of {folder}")
    if not found.is_file():
        raise fault(path, where, f"its file {name!r} is not in {folder}: the data set is not complete")
    return found
