"""Numbered SQL migrations: `0001_initial.sql` and so on, each run once, in one transaction.

`PRAGMA user_version` says which ran last. A released file never changes; a new one is added, and the schema that it
starts from is frozen under `tests/server/schemas/`, from where a test migrates it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from nightschool_server.errors import FailedPreconditionError


@dataclass(frozen=True)
class Migration:
    """One step from a schema version to the next."""

    version: int
    """Of the schema after it ran."""
    name: str
    sql: str


def all_migrations() -> list[Migration]:
    """Every migration, in order; versions run from 1 without a gap."""
    files = sorted(
        (file for file in resources.files(__name__).iterdir() if file.name.endswith(".sql")), key=lambda file: file.name
    )
    found = [Migration(int(file.name[:4]), file.name, file.read_text(encoding="utf-8")) for file in files]
    assert [migration.version for migration in found] == list(range(1, len(found) + 1)), "a gap in the migrations"
    return found


def schema_version(connection: sqlite3.Connection) -> int:
    """The version of the last migration that ran; 0 for an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    """Run what has not run yet. Safe when several processes do it at once: each migration checks under the lock.

    `connection` is in autocommit mode with foreign keys off, as rebuilding a table needs; they are checked before each
    commit. Raises FailedPreconditionError for a database of a newer program.
    """
    check_not_newer(schema_version(connection), migrations)
    for migration in migrations:
        if schema_version(connection) >= migration.version:
            continue
        connection.execute("BEGIN IMMEDIATE")
        try:
            if schema_version(connection) < migration.version:
                for statement in statements(migration.sql):
                    connection.execute(statement)
                broken = connection.execute("PRAGMA foreign_key_check").fetchall()
                assert not broken, f"{migration.name} breaks foreign keys: {broken[:3]}"
                connection.execute(f"PRAGMA user_version = {migration.version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def check_not_newer(version: int, migrations: Sequence[Migration]) -> None:
    """Raises FailedPreconditionError where a newer nightschool wrote the database."""
    known = migrations[-1].version if migrations else 0
    if version > known:
        raise FailedPreconditionError(
            f"the database has schema version {version}, this nightschool knows versions up to {known}: "
            "upgrade nightschool, or use another home folder"
        )


def statements(sql: str) -> Iterator[str]:
    """The statements of a script. sqlite3's own `executescript` would commit the transaction first."""
    pending = ""
    for line in sql.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""
    assert not pending.strip() or pending.strip().startswith("--"), f"unfinished statement: {pending!r}"
