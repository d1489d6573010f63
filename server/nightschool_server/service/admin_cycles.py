"""Operators and the learner's cycles: trigger, list, watch, cancel, pause.

The learner is another process that polls rows: a trigger is a queued row, a cancellation a reason in a column, a
pause a flag. So everything here works whether the learner runs or not, and a watcher sees a cycle go on over
restarts of either. Owns those writes; the learner owns the rest of its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from nightschool_proto.v1 import admin_pb2

from nightschool_server.chat import canonical_json
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.errors import FailedPreconditionError
from nightschool_server.home import REPORT_FILES
from nightschool_server.ids import new_id
from nightschool_server.service.admin_records import CycleRows, cycle_rows, cycle_to_proto
from nightschool_server.service.audit import audit
from nightschool_server.service.wire_replies import timestamp
from nightschool_server.store.store import Store

WATCH_POLL_S = 0.2
REPORT_WAIT_S = 5.0
"""After a cycle's end."""
ALIVE_S = 5.0
"""A learner that has not reported for so long does not run."""


class CycleAdmin:
    """The cycles of one home."""

    def __init__(self, store: Store, config: LearnerConfig) -> None:
        self._store = store
        self._config = config

    def trigger(self, actor: str, reason: str, overrides: list[str]) -> admin_pb2.Cycle:
        """Queue a cycle. Raises FailedPreconditionError while another one is queued or runs, ConfigError."""
        with_overrides(self._config, overrides)
        cycle_id = new_id("cycle")
        with self._store.transaction() as db:
            open_ = db.execute("SELECT id, state FROM cycles WHERE state IN ('queued', 'running') LIMIT 1").fetchone()
            if open_ is not None:
                raise FailedPreconditionError(
                    f"cycle {open_[0]} is {open_[1]}: wait for it (`nightschool cycles watch {open_[0]}`) or cancel it"
                )
            db.execute(
                "INSERT INTO cycles (id, state, trigger, reason, overrides, created_at) "
                "VALUES (?, 'queued', 'manual', ?, ?, ?)",
                (cycle_id, reason, canonical_json(overrides), time.time()),
            )
            audit(db, actor, "trigger_cycle", cycle_id, reason)
        return self.get(cycle_id)

    def get(self, cycle_id: str) -> admin_pb2.Cycle:
        """A cycle as it is now. Raises UnknownCycleError."""
        return cycle_to_proto(cycle_rows(self._store, cycle_id))

    async def watch(self, cycle_id: str) -> AsyncGenerator[admin_pb2.Cycle, None]:
        """The cycle now, then at every change, until it has ended. Raises UnknownCycleError."""
        last: CycleRows | None = None
        with contextlib.closing(_Changes(self._store)) as changes:
            while last is None or not last.ended:
                if changes.any():
                    rows = cycle_rows(self._store, cycle_id)
                    if rows != last:
                        yield cycle_to_proto(rows)
                        last = rows
                        continue
                await asyncio.sleep(WATCH_POLL_S)

    async def report(self, cycle_id: str, kind: str) -> Path:
        """The file of a cycle's report, html or json. Raises UnknownCycleError, FailedPreconditionError without one.

        A cycle that ended a moment ago is given the time to have its report written.
        """
        rows = await asyncio.to_thread(cycle_rows, self._store, cycle_id)
        if not rows.ended:
            raise FailedPreconditionError(
                f"cycle {cycle_id} has not ended: its report is written when it has "
                f"(`nightschool cycles watch {cycle_id}`)"
            )
        path = self._store.home.cycles / cycle_id / REPORT_FILES[kind]
        deadline = (rows.cycle["ended_at"] or 0) + REPORT_WAIT_S
        while not path.is_file():
            if time.time() > deadline:
                raise FailedPreconditionError(
                    f"cycle {cycle_id} has no report: the learner writes it anew within a minute, "
                    "where the cycle ever began"
                )
            await asyncio.sleep(WATCH_POLL_S)
        return path

    def cancel(self, actor: str, cycle_id: str, reason: str) -> admin_pb2.Cycle:
        """Ask the learner to stop a cycle; a queued one ends at once. Raises UnknownCycleError, FailedPreconditionError
        for a cycle that has ended."""
        rows = cycle_rows(self._store, cycle_id)
        if rows.ended:
            raise FailedPreconditionError(f"cycle {cycle_id} has ended already: it is {rows.cycle['state']}")
        why = reason or f"cancelled by {actor}"
        with self._store.transaction() as db:
            db.execute(
                "UPDATE cycles SET cancel_reason = ?, outcome = ?, state = 'cancelled', ended_at = ? "
                "WHERE id = ? AND state = 'queued'",
                (why, why, time.time(), cycle_id),
            )
            db.execute("UPDATE cycles SET cancel_reason = ? WHERE id = ? AND state = 'running'", (why, cycle_id))
            audit(db, actor, "cancel_cycle", cycle_id, reason)
        return self.get(cycle_id)

    def pause(self, actor: str, reason: str, *, paused: bool) -> admin_pb2.LearnerStatus:
        """Hold the learner between two units of work, or let it go on."""
        with self._store.transaction() as db:
            db.execute("UPDATE learner SET paused = ? WHERE id = 1", (int(paused),))
            audit(db, actor, "pause_learner" if paused else "resume_learner", "learner", reason)
        return self.learner_status()

    def learner_status(self) -> admin_pb2.LearnerStatus:
        """What the learner last said of itself."""
        row = self._store.query("SELECT * FROM learner WHERE id = 1")[0]
        current = self._store.query("SELECT id FROM cycles WHERE state = 'running' ORDER BY id DESC LIMIT 1")
        return admin_pb2.LearnerStatus(
            running=_is_alive(row["pid"], row["last_seen_at"]),
            paused=bool(row["paused"]),
            current_cycle=current[0]["id"] if current else "",
            last_error=row["last_error"],
            last_seen_at=timestamp(row["last_seen_at"]),
            num_new_seeds=self._num_new_seeds(),
            next_run_at=timestamp(row["next_run_at"]),
        )

    def _num_new_seeds(self) -> int:
        """Answered requests that may be learned from and that no cycle was there for."""
        row = self._store.query(
            "SELECT COUNT(*) AS n FROM requests WHERE policy = 'train' AND status = 'OK' "
            "AND created_at > COALESCE((SELECT MAX(created_at) FROM cycles), 0)"
        )[0]
        return int(row["n"])


class _Changes:
    """Tells whether anyone has committed to the database since the last question, for the price of a PRAGMA."""

    def __init__(self, store: Store) -> None:
        # A connection of its own: data_version does not count the commits of the connection that asks.
        self._db = sqlite3.connect(f"file:{store.home.database}?mode=ro", uri=True)
        self._seen: int | None = None

    def any(self) -> bool:
        """True at the first question, then after every commit."""
        version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        changed, self._seen = version != self._seen, version
        return changed

    def close(self) -> None:
        self._db.close()


def _is_alive(pid: int | None, last_seen_at: float | None) -> bool:
    if pid is None or last_seen_at is None or time.time() - last_seen_at > ALIVE_S:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
