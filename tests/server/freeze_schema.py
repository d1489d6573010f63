"""Freezes the present schema for the migration tests: `python -m tests.server.freeze_schema`.

Writes `schemas/NNNN.sql`, a dump of a database at every version that has none, with a row of everything that later
migrations must not lose. A dump of a released version never changes; while none is released, delete it to make it anew.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nightschool_server.store import migrations

SCHEMAS = Path(__file__).parent / "schemas"
SAMPLES = SCHEMAS / "samples.sql"
"""Rows of a used home, as version 1 takes them; migrations carry them on."""


def frozen(version: int) -> Path:
    """Where the dump of a version lies."""
    return SCHEMAS / f"{version:04d}.sql"


def dump_of(version: int) -> str:
    """A database with the sample rows, migrated to `version`, as SQL."""
    known = migrations.all_migrations()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrations.migrate(connection, known[:1])
    connection.executescript(SAMPLES.read_text())
    migrations.migrate(connection, known[:version])
    return "\n".join(connection.iterdump()) + f"\nPRAGMA user_version = {version};\n"


def main() -> None:
    """Write what is missing."""
    for migration in migrations.all_migrations():
        path = frozen(migration.version)
        if not path.exists():
            path.write_text(dump_of(migration.version))


if __name__ == "__main__":
    main()
