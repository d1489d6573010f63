"""The store: one SQLite file in WAL mode and the blobs beside it, shared by server and learner.

Owns connections (one for each thread), transactions, migrations and blobs. Which rows mean what is owned by the
modules that write them. A transaction that ended is on the disk (`synchronous=FULL`): it survives kill -9 and a power
loss. Reads never wait for writers. Rows go out as dictionaries.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightschool_server.errors import FailedPreconditionError, NotFoundError, OverloadedError
from nightschool_server.home import Home
from nightschool_server.store import migrations
from nightschool_server.store.durable import TEMPORARY_PREFIX, stage_file, sync_folder

if TYPE_CHECKING:
    import sqlite_utils

BUSY_TIMEOUT_S = 10.0
"""How long a write waits for the other process's."""

RETRY_S = 0.01

Row = dict[str, Any]
Parameters = Sequence[Any] | Mapping[str, Any]

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Store:
    """The database of one home folder. Every method may be called from any thread."""

    def __init__(self, home: Home) -> None:
        """See `open`."""
        self.home = home
        self._local = threading.local()
        self._connections: list[tuple[threading.Thread, sqlite3.Connection]] = []
        self._connections_lock = threading.Lock()
        # SQLite's own lock polls; threads of this process queue here instead.
        self._write_lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, home: Home, *, migrate: bool = True) -> Store:
        """The store of `home`, with the present schema.

        With `migrate` a missing database is made and an older one brought up to date; without, either is refused.
        Raises FailedPreconditionError, also for a database that a newer nightschool wrote.
        """
        known = migrations.all_migrations()
        if migrate:
            home.create()
            _migrate(home.database, known)
        elif not home.database.exists():
            raise FailedPreconditionError(f"{home.path} holds no nightschool.db: start `nightschool serve` first")
        store = cls(home)
        try:
            store._check_schema(known)
        except FailedPreconditionError:
            store.close()
            raise
        return store

    @property
    def schema_version(self) -> int:
        """The number of the last migration that ran."""
        return migrations.schema_version(self.connection)

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            assert not self._closed, "the store is closed"
            connection = _connect(self.home.database)
            connection.execute("PRAGMA foreign_keys = ON")
            self._local.connection = connection
            with self._connections_lock:
                self._drop_connections(of_dead_threads=True)
                self._connections.append((threading.current_thread(), connection))
        return connection

    @property
    def db(self) -> sqlite_utils.Database:
        """This thread's connection as sqlite-utils sees it, for reports; write only in `transaction`.

        Imported here because sqlite-utils imports pandas wherever that is installed: a second and more, which neither a
        command nor a call that is being served should pay.
        """
        from sqlite_utils import Database

        return Database(self.connection, execute_plugins=False)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its beginning; durable once the block has ended.

        Not to be nested. Raises OverloadedError when another process holds the lock for `BUSY_TIMEOUT_S`.
        """
        connection = self.connection
        assert not connection.in_transaction, "transactions do not nest"
        with self._write_lock:
            _begin(connection)
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def query(self, sql: str, parameters: Parameters = ()) -> list[Row]:
        """The rows of a SELECT; inside a transaction of this thread it sees what that wrote."""
        cursor = self.connection.execute(sql, parameters)
        columns = [column[0] for column in cursor.description or ()]
        return [dict(zip(columns, values, strict=True)) for values in cursor]

    def one(self, sql: str, parameters: Parameters = ()) -> Row | None:
        """The first row of a SELECT, or None."""
        found = self.query(sql, parameters)
        return found[0] if found else None

    def put_blob(self, data: bytes, media_type: str) -> str:
        """Keep `data` under its sha256, which is returned. Durable; putting it again costs a look-up."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.has_blob(sha256):
            return sha256
        path = self.blob_path(sha256)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        staged = stage_file(path.parent, data)
        with self.transaction() as db:
            # Renamed under the write lock: `sweep_blobs` cannot take the file away in between.
            staged.replace(path)
            sync_folder(path.parent)
            db.execute(
                "INSERT OR IGNORE INTO blobs (sha256, size_bytes, media_type, created_at) VALUES (?, ?, ?, ?)",
                (sha256, len(data), media_type, time.time()),
            )
        return sha256

    def get_blob(self, sha256: str) -> bytes:
        """The bytes of a blob. Raises NotFoundError, also where the file was damaged."""
        if self.has_blob(sha256):
            data = self.blob_path(sha256).read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        raise NotFoundError("blob", sha256, f"blob {sha256!r} is not in the store: send the bytes again")

    def has_blob(self, sha256: str) -> bool:
        """Whether the store holds the blob."""
        if _SHA256.fullmatch(sha256) is None:
            return False
        known = self.one("SELECT 1 AS known FROM blobs WHERE sha256 = ?", (sha256,))
        return known is not None and self.blob_path(sha256).is_file()

    def blob_path(self, sha256: str) -> Path:
        """Where a blob of that sha256 lies."""
        return self.home.blobs / sha256[:2] / sha256

    def delete_unused_blobs(self, hashes: Sequence[str]) -> int:
        """Delete those of the blobs that no request, no task and no caller holds. Returns how many."""
        return self._delete_unused("sha256 IN (SELECT value FROM json_each(?))", json.dumps(list(hashes)))

    def sweep_blobs(self, older_than_s: float = 3600.0) -> int:
        """Delete every old blob that nothing names, and what crashes left half written. Returns how many blobs."""
        before = time.time() - older_than_s
        num_deleted = self._delete_unused("created_at < ?", before)
        for path in self.home.blobs.glob(f"*/{TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):  # Whoever writes it may be done with it meanwhile.
                if path.stat().st_mtime < before:
                    path.unlink()
        return num_deleted

    def _delete_unused(self, which: str, parameter: str | float) -> int:
        with self.transaction() as db:
            unused = self.query(
                f"SELECT sha256 FROM blobs WHERE {which} AND sha256 NOT IN (SELECT sha256 FROM request_blobs) "
                "AND sha256 NOT IN (SELECT sha256 FROM blob_holders) AND sha256 NOT IN (SELECT sha256 FROM task_blobs) "
                "AND sha256 NOT IN (SELECT value FROM tasks, json_each(tasks.images))",
                (parameter,),
            )
            for row in unused:
                db.execute("DELETE FROM blobs WHERE sha256 = ?", (row["sha256"],))
                self.blob_path(row["sha256"]).unlink(missing_ok=True)
        return len(unused)

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database: what was deleted is then in neither, unless a reader holds it."""
        self.query("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close every thread's connection; no other thread may be using its own."""
        self._closed = True
        with self._connections_lock:
            self._drop_connections(of_dead_threads=False)
        self._local = threading.local()

    def _check_schema(self, known: Sequence[migrations.Migration]) -> None:
        version = self.schema_version
        migrations.check_not_newer(version, known)
        if version < known[-1].version:
            raise FailedPreconditionError(
                f"{self.home.database} has schema version {version}, this nightschool needs {known[-1].version}: "
                "start `nightschool serve`, which brings it up to date"
            )

    def _drop_connections(self, *, of_dead_threads: bool) -> None:
        kept = []
        for thread, connection in self._connections:
            if of_dead_threads and thread.is_alive():
                kept.append((thread, connection))
            else:
                connection.close()
        self._connections = kept


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    # What a caller has erased is overwritten, not only unlinked.
    connection.execute("PRAGMA secure_delete = ON")
    return connection


def _begin(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        raise OverloadedError(f"the store was locked for {BUSY_TIMEOUT_S:g} s by another process: {error}") from error


def _migrate(path: Path, known: Sequence[migrations.Migration]) -> None:
    connection = _connect(path)
    try:
        path.chmod(0o600)
        migrations.check_not_newer(migrations.schema_version(connection), known)
        _enable_wal(connection)
        migrations.migrate(connection, known)
    finally:
        connection.close()


def _enable_wal(connection: sqlite3.Connection) -> None:
    """Changing the journal mode ignores the busy timeout: two processes that open a new file at once must retry."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)
