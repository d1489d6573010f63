"""GAIA's file format (arXiv 2311.12983): a folder with `metadata.jsonl` and the files that its questions name.

    {"task_id": "...", "Question": "...", "Level": 1, "Final answer": "...", "file_name": "",
     "Annotator Metadata": {...}}

The test split has `?` for an answer: such tasks are run, for a submission, and not scored. Owns the reading and the
metrics; the rule is `gaia_scores.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool_server.chat import canonical_json

from nightschool_learner.benchmarks.data_files import fault, file_of, file_within
from nightschool_learner.benchmarks.gaia_scores import final_answer, is_right
from nightschool_learner.benchmarks.task import Attempt, BenchmarkTask, Metric, Row
from nightschool_learner.errors import BenchmarkError

METADATA = "metadata.jsonl"
UNKNOWN = "?"

FORM = (
    "Work out the answer step by step. End with one line of this form:\n"
    "FINAL ANSWER: the answer\n"
    "The answer is a number, as few words as possible, or a comma-separated list of these. A number has no thousands "
    "separator, and no unit such as $ or % unless the question asks for it. Words have no article and no abbreviation, "
    "and digits are written as digits, unless the question asks otherwise."
)
"""What is put behind every question: the form that the scorer needs."""


@dataclass(frozen=True)
class GaiaTask:
    """A question with what its score depends on."""

    task: BenchmarkTask
    level: str
    truth: str | None
    """None: not public."""


@dataclass(frozen=True)
class Gaia:
    """The data set: a `Benchmark`."""

    entries: Mapping[str, GaiaTask]
    digest: str
    name: str = "gaia"

    @property
    def tasks(self) -> Sequence[BenchmarkTask]:
        """In the file's order."""
        return [entry.task for entry in self.entries.values()]

    def score(self, attempt: Attempt) -> Row:
        """An attempt by the leaderboard's rule."""
        entry = self.entries[attempt.task_id]
        answer = final_answer(attempt.final_answer)
        score = None if entry.truth is None else float(bool(answer) and is_right(answer, entry.truth))
        return Row(attempt, {"official": score}, {"level": entry.level, "model_answer": answer, "truth": entry.truth})

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """Accuracy over all and by level, and the share of actions that ran."""
        known = [row for row in rows if row.scores["official"] is not None]
        levels = sorted({str(row.about["level"]) for row in known})
        parts = [(f"answer_level_{level}", [r for r in known if r.about["level"] == level]) for level in levels]
        accuracies = [
            Metric(name, sum(row.scores["official"] or 0.0 for row in part), len(part), "tasks with a known answer")
            for name, part in [("answer_official", known), *parts]
        ]
        actions = [action for row in rows for action in row.attempt.actions]
        ran = float(sum(not action.is_error for action in actions))
        return [*accuracies, Metric("code_exec", ran, len(actions), "actions of the agent")]


def read_gaia(folder: Path) -> Gaia:
    """Read the folder. Raises BenchmarkError with file, line, value and rule."""
    path = file_of(folder, METADATA, "GAIA's")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error
    digest = hashlib.sha256()
    entries: dict[str, GaiaTask] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"line {number}"
            value = _parsed(line, path, where)
            entry = _entry(value, folder, path, where)
            if entry.task.id in entries:
                raise fault(path, where, f"task_id {entry.task.id!r} was used before: ids must differ")
            entries[entry.task.id] = entry
            digest.update(canonical_json({k: v for k, v in value.items() if k != "Annotator Metadata"}).encode())
            for file in entry.task.files:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    if not entries:
        raise fault(path, "", "it has no tasks: it must have one JSON object a line")
    return Gaia(entries, digest.hexdigest())


def _parsed(line: str, path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise fault(path, where, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise fault(path, where, "it must be a JSON object")
    return value


def _entry(value: Mapping[str, Any], folder: Path, path: Path, where: str) -> GaiaTask:
    for key in ("task_id", "Question", "Level", "Final answer"):
        if key not in value:
            raise fault(path, where, f"{key!r} is missing")
    truth = value["Final answer"]
    if not isinstance(truth, str | int | float) or isinstance(truth, bool):
        rule = "an unknown type of answer; it must be a string or a number"
        raise fault(path, where, f"'Final answer' is {str(truth)[:80]!r}, {rule}")
    name = value.get("file_name") or ""
    files = (file_within(folder, str(name), path, where),) if name else ()
    task = BenchmarkTask(str(value["task_id"]), f"{value['Question']}\n\n{FORM}", files)
    return GaiaTask(task, str(value["Level"]), None if str(truth) == UNKNOWN else str(truth))
