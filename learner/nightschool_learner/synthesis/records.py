"""The rows behind a task's files and its verification: how each file came, what the verifier said, who spent what.

Owns the SQL of `task_files` and `verifications`. The task itself is `seed_records.py`'s, what is known of blobs
`description_records.py`'s.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nightschool_server.store.store import Store


@dataclass(frozen=True)
class FileOrigin:
    """How a file that a task planned came to be there."""

    name: str
    type: str
    """`picture` for one that the assistant is shown, else the type of a file in its workspace."""
    description: str
    source: Literal["retrieved", "made"]
    sha256: str
    similarity: float = 0.0
    """Of a retrieved one: between the plan's description and what it was found by."""
    response_id: str = ""
    """Of a retrieved one: the request that brought it."""
    num_attempts: int = 0
    """Of a made one: programs that were written for it."""
    code: str = ""
    """Of a made one: the program that made it."""


@dataclass(frozen=True)
class Verification:
    """What the verifier said of one draft."""

    attempt: int
    """Of the slot, from 0."""
    verdict: Literal["keep", "repair", "drop", "unreadable"]
    reason: str
    original: str
    """The task as the writer wrote it; where the verdict is `repair`, the task's text is another one."""


def insert_origins(db: sqlite3.Connection, task_id: str, origins: Sequence[FileOrigin]) -> None:
    """Write how a task's planned files came, and have the task come from the requests that brought them, too."""
    db.executemany(
        "INSERT INTO task_files (task_id, position, name, type, description, source, sha256, similarity, response_id, "
        "num_attempts, code) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (task_id, i, o.name, o.type, o.description, o.source, o.sha256, o.similarity, o.response_id,
             o.num_attempts, o.code)
            for i, o in enumerate(origins)
        ],
    )  # fmt: skip
    # Forgetting a caller takes every task that names this request with it.
    db.executemany(
        "INSERT OR IGNORE INTO task_seeds (task_id, response_id) VALUES (?, ?)",
        [(task_id, origin.response_id) for origin in origins if origin.response_id],
    )


def insert_verifications(db: sqlite3.Connection, task_id: str, verifications: Sequence[Verification]) -> None:
    """Write what the verifier said of a slot's drafts."""
    db.executemany(
        "INSERT INTO verifications (task_id, attempt, verdict, reason, original) VALUES (?, ?, ?, ?, ?)",
        [(task_id, v.attempt, v.verdict, v.reason, v.original) for v in verifications],
    )


def origins_of(store: Store, task_id: str) -> tuple[FileOrigin, ...]:
    """How a task's planned files came, in their order."""
    columns = ", ".join(FileOrigin.__dataclass_fields__)
    rows = store.query(f"SELECT {columns} FROM task_files WHERE task_id = ? ORDER BY position", (task_id,))
    return tuple(FileOrigin(**row) for row in rows)


def verification_of(store: Store, task_id: str) -> Verification | None:
    """What the verifier said last of a task."""
    row = store.one(
        "SELECT attempt, verdict, reason, original FROM verifications WHERE task_id = ? ORDER BY attempt DESC LIMIT 1",
        (task_id,),
    )
    return None if row is None else Verification(**row)


_WAS_KEPT = "t.cycle_id = :cycle AND json_extract(t.raw, '$[#-1].verdict') = 'kept'"
"""Kept when it was written, whatever a probe said afterwards."""


def reuse_of(store: Store, cycle_id: str) -> dict[str, int]:
    """How many kept tasks of a cycle each retrieved blob is in."""
    rows = store.query(
        "SELECT f.sha256, COUNT(*) AS n FROM task_files f JOIN tasks t ON t.id = f.task_id "
        f"WHERE {_WAS_KEPT} AND f.source = 'retrieved' GROUP BY f.sha256",
        {"cycle": cycle_id},
    )
    return {row["sha256"]: int(row["n"]) for row in rows}


def file_counts(origins: Sequence[FileOrigin], verifications: Sequence[Verification]) -> dict[str, int]:
    """Counts of a kept task's files, by how they came, and of what the verifier said."""
    counts = Counter(f"files_{origin.source}" for origin in origins)
    counts.update(f"verifier_{said.verdict}" for said in verifications)
    return dict(counts)


def file_counts_of(store: Store, cycle_id: str) -> dict[str, int]:
    """`file_counts` over all tasks of a cycle."""
    rows = store.query(
        "SELECT 'files_' || f.source AS name, COUNT(*) AS n FROM task_files f JOIN tasks t ON t.id = f.task_id "
        f"WHERE {_WAS_KEPT} GROUP BY f.source "
        "UNION ALL SELECT 'verifier_' || v.verdict, COUNT(*) FROM verifications v JOIN tasks t ON t.id = v.task_id "
        "WHERE t.cycle_id = :cycle GROUP BY v.verdict",
        {"cycle": cycle_id},
    )
    return {row["name"]: int(row["n"]) for row in rows}
