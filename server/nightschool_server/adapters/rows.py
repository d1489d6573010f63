"""The rows of the registry: adapters, the route, the audit trail, sessions, and the evaluations that promote.

Every function is one read or one transaction. Decisions are the registry's (`registry.py`).
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nightschool_server.adapters.folder import AdapterFolder
from nightschool_server.chat import canonical_json
from nightschool_server.engine import BASE
from nightschool_server.store.store import Row, Store

AdapterState = Literal["candidate", "canary", "active", "retired", "rejected", "quarantined"]

SERVER = "server"
"""The actor of what nobody asked for."""


@dataclass(frozen=True)
class AdapterRecord:
    """A row of `adapters` that was not deleted."""

    name: str
    sequence: int
    digest: str
    state: AdapterState
    parent: str
    cycle_id: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    manifest: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True)
class Route:
    """The one row that says who answers."""

    active: str
    previous: str
    """What a rollback goes to."""
    changed_at: float


@dataclass(frozen=True)
class Entry:
    """A line of the audit trail, to be written."""

    actor: str
    action: str
    subject: str
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SessionRow:
    """Which adapter a session keeps."""

    caller: str
    id: str
    adapter: str
    created_at: float
    last_used_at: float


@dataclass(frozen=True)
class Move:
    """The pointer's way from one adapter to another."""

    old: Route
    new: Route
    entries: Sequence[Entry]
    sessions: Sequence[SessionRow] = ()
    """Those that stay behind on the old one: without their rows a restart would move them, too."""


def get_record(store: Store, name: str) -> AdapterRecord | None:
    """The adapter of that name, None where there is none or it was deleted."""
    row = store.one(f"SELECT {_COLUMNS} FROM adapters WHERE name = ? AND deleted_at IS NULL", (name,))
    return None if row is None else _record(row)


def get_state(store: Store, name: str) -> AdapterState | None:
    """The state of the adapter of that name, None where there is none or it was deleted."""
    row = store.one("SELECT state FROM adapters WHERE name = ? AND deleted_at IS NULL", (name,))
    return None if row is None else row["state"]


def all_records(store: Store) -> list[AdapterRecord]:
    """Every adapter, newest first."""
    rows = store.query(f"SELECT {_COLUMNS} FROM adapters WHERE deleted_at IS NULL ORDER BY sequence DESC")
    return [_record(row) for row in rows]


def page_of_records(store: Store, *, state: str, before_sequence: int | None, limit: int) -> list[AdapterRecord]:
    """Some adapters, newest first; of one state where `state` is not empty."""
    rows = store.query(
        f"SELECT {_COLUMNS} FROM adapters WHERE deleted_at IS NULL AND (? = '' OR state = ?) AND sequence < ? "
        "ORDER BY sequence DESC LIMIT ?",
        (state, state, 2**62 if before_sequence is None else before_sequence, limit),
    )
    return [_record(row) for row in rows]


def find_by_digest(store: Store, digest: str) -> AdapterRecord | None:
    """The newest adapter with this content."""
    row = store.one(
        f"SELECT {_COLUMNS} FROM adapters WHERE digest = ? AND deleted_at IS NULL ORDER BY sequence DESC", (digest,)
    )
    return None if row is None else _record(row)


def last_sequence(store: Store) -> int:
    """Of every adapter that ever was, deleted ones included."""
    return int(store.query("SELECT COALESCE(MAX(sequence), 0) AS last FROM adapters")[0]["last"])


def is_deleted(store: Store, name: str) -> bool:
    """Whether an adapter of that name was deleted."""
    return store.one("SELECT 1 FROM adapters WHERE name = ? AND deleted_at IS NOT NULL", (name,)) is not None


def insert_adapter(store: Store, folder: AdapterFolder, state: AdapterState, entry: Entry) -> None:
    """Write the row of a published folder, whose manifest says the rest."""
    manifest = folder.manifest
    with store.transaction() as db:
        known = store.one("SELECT id FROM cycles WHERE id = ?", (manifest.get("cycle_id"),))
        db.execute(
            "INSERT INTO adapters (name, sequence, digest, state, parent, cycle_id, rank, alpha, target_modules, "
            "size_bytes, manifest, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(folder.name, manifest["sequence"], folder.digest, state, manifest.get("parent") or BASE),
                *(None if known is None else known["id"], folder.rank, folder.alpha),
                *(canonical_json(list(folder.target_modules)), folder.size_bytes, canonical_json(dict(manifest))),
                manifest.get("created_at") or time.time(),
            ),
        )
        _write(db, entry)


def set_state(store: Store, name: str, state: AdapterState, entry: Entry) -> None:
    """Move an adapter to another state, on the record."""
    with store.transaction() as db:
        db.execute("UPDATE adapters SET state = ? WHERE name = ?", (state, name))
        _write(db, entry)


def delete_adapter(store: Store, name: str, entry: Entry) -> None:
    """Mark an adapter as deleted; its row stays, because replies and cycles name it."""
    with store.transaction() as db:
        db.execute("UPDATE adapters SET deleted_at = ? WHERE name = ?", (time.time(), name))
        _write(db, entry)


def get_route(store: Store) -> Route:
    """Who answers now."""
    return Route(**store.query("SELECT active, previous, changed_at FROM routes WHERE id = 1")[0])


def move_route(store: Store, move: Move) -> None:
    """The pointer's move, in one transaction. Raises AssertionError where another process moved it meanwhile."""
    old, new = move.old, move.new
    with store.transaction() as db:
        moved = db.execute(
            "UPDATE routes SET active = ?, previous = ?, changed_at = ? WHERE id = 1 AND active = ?",
            (new.active, new.previous, new.changed_at, old.active),
        )
        assert moved.rowcount == 1, f"another process moved the route away from {old.active}"
        # A quarantined one stays so: it did not retire.
        db.execute("UPDATE adapters SET state = 'retired' WHERE name = ? AND state <> 'quarantined'", (old.active,))
        db.execute("UPDATE adapters SET state = 'active' WHERE name = ?", (new.active,))
        for entry in move.entries:
            _write(db, entry)
        _write_sessions(db, move.sessions)


def set_previous(store: Store, previous: str) -> None:
    """Correct what a rollback goes to."""
    with store.transaction() as db:
        db.execute("UPDATE routes SET previous = ? WHERE id = 1", (previous,))


def came_from(store: Store, name: str) -> str | None:
    """What was active when `name` was last promoted, None where it never was."""
    row = store.one(
        "SELECT detail FROM events WHERE subject = ? AND action = 'promote' ORDER BY id DESC LIMIT 1", (name,)
    )
    return None if row is None else json.loads(row["detail"]).get("from", BASE)


def before(store: Store, name: str) -> str:
    """What a rollback from `name` goes to: what was active before it and may still serve, at last the base model."""
    seen = {name}
    while name != BASE:
        name = came_from(store, name) or BASE
        if name in seen:
            return BASE
        if name == BASE or get_state(store, name) not in (None, "quarantined"):
            return name
        seen.add(name)
    return BASE


def events_of(store: Store, subject: str, limit: int = 50) -> list[Row]:
    """The audit trail of an adapter, newest first: at, actor, action, reason, detail."""
    return store.query(
        "SELECT at, actor, action, reason, detail FROM events WHERE subject = ? ORDER BY id DESC LIMIT ?",
        (subject, limit),
    )


def latest_evaluation(store: Store, candidate: str) -> Row | None:
    """The newest row of `evaluations` with this candidate."""
    return store.one(
        "SELECT * FROM evaluations WHERE candidate = ? ORDER BY created_at DESC, id DESC LIMIT 1", (candidate,)
    )


def latest_comparison(store: Store, candidate: str, incumbent: str) -> Row | None:
    """The newest evaluation of this candidate against this incumbent: the one that counts at the gate."""
    return store.one(
        "SELECT * FROM evaluations WHERE candidate = ? AND incumbent = ? ORDER BY created_at DESC, id DESC LIMIT 1",
        (candidate, incumbent),
    )


def read_sessions(store: Store, used_since: float) -> list[SessionRow]:
    """Sessions that have not idled out."""
    rows = store.query(
        "SELECT caller, id, adapter, created_at, last_used_at FROM sessions "
        "WHERE last_used_at >= ? ORDER BY last_used_at",
        (used_since,),
    )
    return [SessionRow(**row) for row in rows]


def save_sessions(store: Store, sessions: Sequence[SessionRow], used_since: float) -> None:
    """Write sessions that were used, and delete those that idled out."""
    with store.transaction() as db:
        _write_sessions(db, sessions)
        db.execute("DELETE FROM sessions WHERE last_used_at < ?", (used_since,))


def _write_sessions(db: sqlite3.Connection, sessions: Iterable[SessionRow]) -> None:
    db.executemany(
        "INSERT INTO sessions (caller, id, adapter, created_at, last_used_at) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (caller, id) DO UPDATE SET adapter = excluded.adapter, created_at = excluded.created_at, "
        "last_used_at = excluded.last_used_at",
        [(one.caller, one.id, one.adapter, one.created_at, one.last_used_at) for one in sessions],
    )


def _write(db: sqlite3.Connection, entry: Entry) -> None:
    db.execute(
        "INSERT INTO events (at, actor, action, subject, reason, detail) VALUES (?, ?, ?, ?, ?, ?)",
        (time.time(), entry.actor, entry.action, entry.subject, entry.reason, canonical_json(dict(entry.detail))),
    )


def _record(row: Row) -> AdapterRecord:
    return AdapterRecord(
        **{
            **row,
            "target_modules": tuple(json.loads(row["target_modules"])),
            "manifest": json.loads(row["manifest"]),
        }
    )


_COLUMNS = ", ".join(AdapterRecord.__dataclass_fields__)
