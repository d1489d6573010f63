"""The folder of one run of a benchmark: what was run, every attempt as it came, and what the report makes of them.

    run.json        what the attempts depend on; a folder holds one run and never another
    attempts.jsonl  one line an attempt, on disk before the next begins at its place
    rows.jsonl      the attempts with their scores, written anew by every report
    summary.json    the metrics

A kill costs the attempts in flight: a line that was cut is taken away, and its task is run again. Owns these files
but the last two, which are `report.py`'s.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from nightschool_learner.benchmarks.task import Attempt
from nightschool_learner.errors import BenchmarkError

RUN_FILE = "run.json"
ATTEMPTS_FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Run:
    """What the attempts of a run depend on."""

    benchmark: str
    data_digest: str
    base_model: str
    adapter: str
    max_steps: int | None
    """None: the server's."""
    max_tokens: int | None
    timeout_s: float
    with_images: bool
    """Whether the model was shown the tasks' images."""


class AttemptLog:
    """The attempts of one run; use as a context. Appends are durable when they return."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Raises BenchmarkError where the folder holds another run, or another process writes to it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = (folder / ATTEMPTS_FILE).open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BenchmarkError(f"--out {folder}: another evaluation is writing there: wait for it") from error
            self._claim(run)
            self.attempts = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AttemptLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def add(self, attempt: Attempt) -> None:
        """Keep one more attempt."""
        self._file.write(json.dumps(asdict(attempt), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.attempts[attempt.task_id] = attempt

    def _claim(self, run: Run) -> None:
        path, wanted = self.folder / RUN_FILE, asdict(run)
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=2) + "\n")
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if found.get(key) != value:
                raise BenchmarkError(
                    f"--out {self.folder} holds a run with {key} {found.get(key)!r}, and this one has {value!r}: "
                    "give another folder, or remove this one"
                )

    def _read(self) -> dict[str, Attempt]:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        attempts = [Attempt.from_json(json.loads(line)) for line in whole.splitlines()]
        return {attempt.task_id: attempt for attempt in attempts}


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
