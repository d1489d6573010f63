"""The rows that seeds come from and the rows of seeds and written tasks.

Owns the SQL of `requests`, `messages` and `feedback` on the learner's side (read only), `cycle_seeds`,
`tasks` and `task_seeds`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nightschool_server.chat import File, Message, canonical_json, file_from_dict, file_to_dict, messages_from_json
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

KEPT = "kept"
"""State of a task that is practised; any other state is the reason for which it was dropped."""


@dataclass(frozen=True)
class LoggedRequest:
    """A request that its caller lets the learner use."""

    response_id: str
    session_id: str
    prompt: str
    """The text of its user turn, the first one where there are more."""
    images: tuple[str, ...]
    """sha256 of the pictures of that turn."""
    num_user_turns: int
    num_tool_errors: int
    is_unfinished: bool
    """A task that ended at a limit, without an answer."""
    good: bool | None
    """The latest thumb, if there is one."""
    score: float | None
    """The latest score, if there is one."""
    files: tuple[File, ...] = ()
    """That the turn brought."""


@dataclass(frozen=True)
class Seed:
    """A request chosen for a cycle."""

    response_id: str
    prompt: str
    images: tuple[str, ...]
    why: str
    files: tuple[File, ...] = ()

    @property
    def contents(self) -> tuple[str, ...]:
        """sha256 of its pictures and files."""
        return contents_of(self.images, self.files)


@dataclass(frozen=True)
class Attempt:
    """One answer of the writer, and what became of it."""

    text: str
    verdict: str
    """`kept` or the reason for dropping it."""
    tokens: int
    reason: str = ""
    """That in a sentence, where somebody gave one."""
    role_tokens: Mapping[str, int] = field(default_factory=dict)
    """Of the roles that saw to it behind the writer."""


@dataclass(frozen=True)
class TaskRow:
    """A row of `tasks`."""

    id: str
    slot: int
    prompt: str
    images: tuple[str, ...]
    state: str
    files: tuple[File, ...] = ()
    """That lie in its workspace when it begins."""

    @property
    def contents(self) -> tuple[str, ...]:
        """sha256 of its pictures and files."""
        return contents_of(self.images, self.files)


def contents_of(images: Sequence[str], files: Sequence[File]) -> tuple[str, ...]:
    """sha256 of pictures and files: beside its words, what makes a task another one."""
    return (*images, *(file.sha256 for file in files))


def trainable_requests(store: Store, limit: int) -> list[LoggedRequest]:
    """The newest `limit` answered requests that may be learned from, newest first."""
    rows = store.query(
        "SELECT r.id, r.session_id, r.num_tool_errors, r.outcome, "
        " (SELECT f.good FROM feedback f WHERE f.response_id = r.id AND f.good IS NOT NULL "
        "  ORDER BY f.created_at DESC LIMIT 1) AS good, "
        " (SELECT f.score FROM feedback f WHERE f.response_id = r.id AND f.score IS NOT NULL "
        "  ORDER BY f.created_at DESC LIMIT 1) AS score, "
        " (SELECT json_group_array(json(u.parts)) FROM "
        "  (SELECT m.parts FROM messages m WHERE m.response_id = r.id AND m.role = 'user' AND m.sampled = 0 "
        "   ORDER BY m.position) u) AS turns "
        "FROM requests r WHERE r.policy = 'train' AND r.status = 'OK' "
        "ORDER BY r.created_at DESC, r.id DESC LIMIT ?",
        (limit,),
    )
    return [_logged(row) for row in rows]


def count_seeds(store: Store, cycle_id: str) -> int:
    """How many seeds the cycle has."""
    return int(store.query("SELECT COUNT(*) AS n FROM cycle_seeds WHERE cycle_id = ?", (cycle_id,))[0]["n"])


def insert_seeds(store: Store, cycle_id: str, seeds: Sequence[Seed]) -> None:
    """Write the cycle's seeds, all at once."""
    with store.transaction() as db:
        db.executemany(
            "INSERT INTO cycle_seeds (cycle_id, response_id, position, why) VALUES (?, ?, ?, ?)",
            [(cycle_id, seed.response_id, position, seed.why) for position, seed in enumerate(seeds)],
        )


def seeds_of(store: Store, cycle_id: str) -> list[Seed]:
    """The cycle's seeds in their order."""
    rows = store.query(
        "SELECT s.response_id AS id, s.why, '' AS session_id, 0 AS num_tool_errors, '' AS outcome, "
        " NULL AS good, NULL AS score, "
        " (SELECT json_group_array(json(m.parts)) FROM messages m "
        "  WHERE m.response_id = s.response_id AND m.role = 'user' AND m.sampled = 0) AS turns "
        "FROM cycle_seeds s WHERE s.cycle_id = ? ORDER BY s.position",
        (cycle_id,),
    )
    logged = [(_logged(row), row["why"]) for row in rows]
    return [Seed(one.response_id, one.prompt, one.images, why, one.files) for one, why in logged]


def insert_task(
    db: sqlite3.Connection, cycle_id: str, task: TaskRow, attempts: Sequence[Attempt], seeds: Sequence[Seed]
) -> None:
    """Write a finished slot, with every answer that the writer gave for it."""
    db.execute(
        "INSERT INTO tasks (id, cycle_id, slot, prompt, images, state, raw, tokens, created_at, files, role_tokens) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            task.id, cycle_id, task.slot, task.prompt, canonical_json(list(task.images)), task.state,
            canonical_json([_attempt_to_dict(a) for a in attempts]), sum(a.tokens for a in attempts), time.time(),
            canonical_json([file_to_dict(file) for file in task.files]), canonical_json(_role_tokens(attempts)),
        ),
    )  # fmt: skip
    link_blobs(db, task.id, [file.sha256 for file in task.files])
    db.executemany(
        "INSERT INTO task_seeds (task_id, response_id) VALUES (?, ?)",
        [(task.id, seed.response_id) for seed in seeds],
    )


def link_blobs(db: sqlite3.Connection, task_id: str, hashes: Sequence[str]) -> None:
    """Have the task name blobs, which then stay as long as its row."""
    db.executemany(
        "INSERT OR IGNORE INTO task_blobs (task_id, sha256) SELECT ?, sha256 FROM blobs WHERE sha256 = ?",
        [(task_id, sha256) for sha256 in hashes],
    )


def tasks_of(store: Store, cycle_id: str) -> list[TaskRow]:
    """Every finished slot, in order."""
    rows = store.query(
        "SELECT id, slot, prompt, images, state, files FROM tasks WHERE cycle_id = ? ORDER BY slot", (cycle_id,)
    )
    return [_task(row) for row in rows]


def tasks_of_other_cycles(store: Store, cycle_id: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(prompt, contents) of every task that another cycle kept."""
    rows = store.query("SELECT prompt, images, files FROM tasks WHERE cycle_id <> ? AND state = ?", (cycle_id, KEPT))
    for row in rows:
        yield row["prompt"], contents_of(json.loads(row["images"]), _files(row))


def writer_counts(store: Store, cycle_id: str) -> dict[str, int]:
    """Counts over all attempts of the cycle: kept, dropped by reason, tokens."""
    counts: Counter[str] = Counter()
    for row in store.query("SELECT state, raw, tokens, role_tokens FROM tasks WHERE cycle_id = ?", (cycle_id,)):
        counts.update(attempt_counts([Attempt(a["text"], a["verdict"], 0) for a in json.loads(row["raw"])]))
        counts["tokens"] += row["tokens"]
        counts.update({f"{role}_tokens": n for role, n in json.loads(row["role_tokens"]).items()})
    return dict(counts)


def attempt_counts(attempts: Sequence[Attempt]) -> dict[str, int]:
    """Counts of a slot's attempts by verdict, and their tokens by role, the writer's as `tokens`."""
    counts = Counter(KEPT if a.verdict == KEPT else f"dropped_{a.verdict}" for a in attempts)
    counts["tokens"] = sum(a.tokens for a in attempts)
    counts.update({f"{role}_tokens": n for role, n in _role_tokens(attempts).items()})
    return dict(counts)


def new_task(slot: int, prompt: str, images: Sequence[str], state: str, files: Sequence[File] = ()) -> TaskRow:
    """A task with a fresh id."""
    return TaskRow(new_id("task"), slot, prompt, tuple(images), state, tuple(files))


def _attempt_to_dict(attempt: Attempt) -> dict[str, str]:
    told = {"reason": attempt.reason} if attempt.reason else {}
    return {"text": attempt.text, "verdict": attempt.verdict, **told}


def _role_tokens(attempts: Sequence[Attempt]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for attempt in attempts:
        total.update(attempt.role_tokens)
    return dict(total)


def _task(row: Mapping[str, Any]) -> TaskRow:
    images = tuple(json.loads(row["images"]))
    return TaskRow(row["id"], row["slot"], row["prompt"], images, row["state"], _files(row))


def _files(row: Mapping[str, Any]) -> tuple[File, ...]:
    return tuple(file_from_dict(file) for file in json.loads(row["files"]))


def _logged(row: Mapping[str, Any]) -> LoggedRequest:
    turns: list[Message] = [
        messages_from_json(canonical_json([{"role": "user", "parts": parts}]))[0] for parts in json.loads(row["turns"])
    ]
    first = turns[0] if turns else None
    return LoggedRequest(
        response_id=row["id"],
        session_id=row["session_id"] or "",
        prompt=first.text.strip() if first else "",
        images=first.images if first else (),
        num_user_turns=len(turns),
        num_tool_errors=row["num_tool_errors"],
        is_unfinished=row["outcome"] not in ("", "answered"),
        good=None if row["good"] is None else bool(row["good"]),
        score=row["score"],
        files=first.files if first else (),
    )
