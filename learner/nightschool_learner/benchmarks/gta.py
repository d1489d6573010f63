"""GTA's file format (arXiv 2407.08713): a folder with `dataset.json`, `toolmeta.json` and `image/`.

    dataset.json    {"0": {"tools": [{"name", ...}], "files": [{"type", "path", "url"}], "dialogs": [...],
                           "gt_answer": ...}, ...}
    toolmeta.json   {"OCR": {"name": "OCR", "description", "inputs", "outputs"}, ...}

A dialog is the user's query, then steps of the assistant with `tool_calls` and what the tools gave back, then the
answer. `gt_answer` is `{"whitelist": [[alias, ...], ...], "blacklist": [[...]] | null}`, a list of reference texts, or
null for a task whose answer is a picture. Owns the reading; the rules are `gta_scores.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool_server.chat import canonical_json

from nightschool_learner.benchmarks import gta_scores
from nightschool_learner.benchmarks.data_files import fault, file_of, file_within, read_json
from nightschool_learner.benchmarks.gta_scores import Phrases, Reference, Texts
from nightschool_learner.benchmarks.task import Attempt, BenchmarkTask, Metric, Row

DATASET = "dataset.json"
TOOLS = "toolmeta.json"

Similarity = Callable[[str, Sequence[str]], float]
"""How like the likest of some texts a text is, in [0, 1]."""


@dataclass(frozen=True)
class GtaTask:
    """A task with what its scores depend on."""

    task: BenchmarkTask
    reference: Reference
    tools: tuple[str, ...]
    """What the reference calls, step by step."""


@dataclass(frozen=True)
class Gta:
    """The data set: a `Benchmark`."""

    entries: Mapping[str, GtaTask]
    digest: str
    similarity: Similarity | None = None
    """For free text; None leaves it unscored."""
    name: str = "gta"

    @property
    def tasks(self) -> Sequence[BenchmarkTask]:
        """In the order of their indices."""
        return [entry.task for entry in self.entries.values()]

    def score(self, attempt: Attempt) -> Row:
        """An attempt by every rule."""
        entry = self.entries[attempt.task_id]
        likeness = None
        if isinstance(entry.reference, Texts) and self.similarity is not None and attempt.final_answer:
            likeness = self.similarity(attempt.final_answer, entry.reference.references)
        return gta_scores.scored(attempt, entry.reference, entry.tools, likeness)

    def metrics(self, rows: Sequence[Row]) -> list[Metric]:
        """See `gta_scores.metrics`."""
        return gta_scores.metrics(rows)


def read_gta(folder: Path, similarity: Similarity | None = None) -> Gta:
    """Read the folder. Raises BenchmarkError with file, task, value and rule."""
    path = file_of(folder, DATASET, "GTA's")
    data = read_json(path)
    known = read_json(file_of(folder, TOOLS, "GTA's"))
    if not isinstance(data, dict) or not data:
        raise fault(path, "", "it must be an object of tasks by index, and have at least one")
    if not isinstance(known, dict):
        raise fault(folder / TOOLS, "", "it must be an object of tools by name")
    if wrong := sorted(index for index in data if not index.isdecimal()):
        raise fault(path, "", f"the key {wrong[0]!r} is no index: keys are 0, 1, 2, ...")
    entries = {index: _entry(index, data[index], folder, frozenset(known)) for index in sorted(data, key=int)}
    return Gta(entries, _digest(data, entries.values()), similarity)


def _entry(index: str, value: Any, folder: Path, known: frozenset[str]) -> GtaTask:
    where = f"task {index!r}"
    path = folder / DATASET
    if not isinstance(value, dict):
        raise fault(path, where, "it must be an object with tools, files, dialogs and gt_answer")
    for key in ("files", "dialogs"):
        if not isinstance(value.get(key), list):
            raise fault(path, where, f"{key} must be a list")
    if "gt_answer" not in value:
        raise fault(path, where, "gt_answer is missing; it is null for a task whose answer is a picture")
    try:
        names = [str(file["path"]) for file in value["files"]]
        tools = _reference_tools(value["dialogs"])
        query = next(str(turn["content"]) for turn in value["dialogs"] if turn["role"] == "user")
    except (KeyError, TypeError, IndexError, StopIteration) as error:
        raise fault(path, where, f"files and dialogs are not as GTA writes them: {error!r}") from error
    if unknown := [name for name in tools if name not in known]:
        raise fault(path, where, f"its dialog calls {unknown[0]!r}, which {TOOLS} does not have")
    files = tuple(file_within(folder, name, path, where) for name in names)
    return GtaTask(BenchmarkTask(index, query, files), _reference(value["gt_answer"], path, where), tuple(tools))


def _reference_tools(dialogs: Sequence[Mapping[str, Any]]) -> list[str]:
    calls = [call for turn in dialogs if turn["role"] == "assistant" for call in turn.get("tool_calls") or ()]
    return [str(call["function"]["name"]) for call in calls]


def _reference(value: Any, path: Path, where: str) -> Reference:
    if not value and (value is None or isinstance(value, dict | list)):
        return None  # what the public evaluator counts as a task without an answer in words
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return Texts(tuple(value))
    if isinstance(value, dict):
        whitelist, blacklist = value.get("whitelist"), value.get("blacklist") or []
        if whitelist and _are_groups(whitelist) and _are_groups(blacklist):
            return Phrases(tuple(map(tuple, whitelist)), tuple(map(tuple, blacklist)))
        rule = "its whitelist and blacklist must be lists of lists of aliases, none of them empty"
        raise fault(path, where, f"gt_answer {str(value)[:80]}: {rule}")
    raise fault(
        path,
        where,
        f"gt_answer is {str(value)[:80]!r}, an unknown type of answer; it must be an object with whitelist and "
        "blacklist, a list of texts, or null",
    )


def _are_groups(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(group, list) and group and all(isinstance(a, str) and a for a in group) for group in value)


def _digest(data: Mapping[str, Any], entries: Any) -> str:
    digest = hashlib.sha256(canonical_json(data).encode())
    for entry in entries:
        for file in entry.task.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
