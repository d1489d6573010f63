"""What is held out: the application's evaluation set, its earlier versions, and whatever other files are named.

Every held-out task that a home meets is remembered by its text and pictures, so that a set that was changed or replaced
is never practised either: what one adapter was proven on would else be taught to the next. Owns the SQL of
`held_out_tasks`; the comparing is `screening.py`'s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nightschool_server.app import App, EvaluationTask, load_evaluation
from nightschool_server.chat import canonical_json
from nightschool_server.errors import AppError, ConfigError
from nightschool_server.evaluation_set import read_evaluation
from nightschool_server.store.store import Store

from nightschool_learner.picture_index import Look, Looks, look_at
from nightschool_learner.screening import HeldOut, Similar, task_key
from nightschool_learner.stages import Cycle


@dataclass(frozen=True)
class HeldOutTask:
    """A held-out task as far as others are compared with it."""

    prompt: str
    images: tuple[str, ...]
    """sha256 of each."""
    looks: tuple[Look, ...] = ()
    """Of those that can be read."""

    @property
    def digest(self) -> str:
        """Names the task: the same text with the same pictures is the same one, in whatever set."""
        return hashlib.sha256(canonical_json([self.prompt, list(self.images)]).encode()).hexdigest()


def held_out_of(cycle: Cycle, look: Looks | None = None) -> HeldOut:
    """The screen of a cycle; remembers what it is made of. `look` takes pictures of the store.

    Raises AppError where the application's set cannot be read, ConfigError for a file of `screen.held_out_files`.
    """
    config, store = cycle.config.screen, cycle.store
    given = [*_of_app(cycle.app), *(task for name in config.held_out_files for task in _of_file(name))]
    known = remember(store, given)
    if not config.earlier_sets:
        digests = {_bare(task).digest for task in given}
        known = [task for task in known if task.digest in digests]
    keys = [task_key(task.prompt, task.images) for task in known]
    texts = [key.words for key in keys if not key.images and key.words]
    looks = [look for task in known for look in task.looks]
    return HeldOut(keys, Similar(config, texts=texts, looks=looks, look=look or Looks(store.get_blob)))


def remember(store: Store, tasks: Sequence[EvaluationTask]) -> list[HeldOutTask]:
    """Write the tasks that the home has not met. Returns all that it has ever met."""
    known = {task.digest: task for task in _rows(store)}
    new: dict[str, HeldOutTask] = {}
    for task in tasks:
        digest = _bare(task).digest
        if digest not in known and digest not in new:
            new[digest] = _looked_at(task)
    if new:
        with store.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO held_out_tasks (digest, prompt, images, looks, met_at) VALUES (?, ?, ?, ?, ?)",
                [
                    (digest, task.prompt, canonical_json(list(task.images)), _looks_to_json(task.looks), time.time())
                    for digest, task in new.items()
                ],
            )
    return [*known.values(), *new.values()]


def _of_app(app: App) -> tuple[EvaluationTask, ...]:
    """An application without a set holds nothing out."""
    return () if app.evaluation is None else load_evaluation(app).tasks


def _of_file(name: str) -> tuple[EvaluationTask, ...]:
    try:
        return read_evaluation(Path(name).expanduser()).tasks
    except AppError as error:
        raise ConfigError(f"learner.screen.held_out_files names {name!r}: {error}") from error


def _rows(store: Store) -> Iterable[HeldOutTask]:
    for row in store.query("SELECT prompt, images, looks FROM held_out_tasks ORDER BY met_at, digest"):
        looks = tuple(Look.from_bytes(base64.b64decode(look)) for look in json.loads(row["looks"]))
        yield HeldOutTask(row["prompt"], tuple(json.loads(row["images"])), looks)


def _bare(task: EvaluationTask) -> HeldOutTask:
    return HeldOutTask(task.prompt, tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in task.images))


def _looked_at(task: EvaluationTask) -> HeldOutTask:
    looks = (look_at(path.read_bytes()) for path in task.images)
    return HeldOutTask(task.prompt, _bare(task).images, tuple(look for look in looks if look))


def _looks_to_json(looks: Sequence[Look]) -> str:
    return canonical_json([base64.b64encode(look.to_bytes()).decode() for look in looks])
