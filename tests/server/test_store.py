"""The store: one file, one schema, transactions that hold after kill -9, blobs by content."""

from __future__ import annotations

import hashlib
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from nightschool_server.errors import FailedPreconditionError, NotFoundError
from nightschool_server.home import Home
from nightschool_server.store import migrations
from nightschool_server.store.store import Store

from tests.server.freeze_schema import dump_of, frozen

VERSIONS = [migration.version for migration in migrations.all_migrations()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(Home(tmp_path / "home"))
    yield opened
    opened.close()


def note(store: Store, subject: str) -> None:
    with store.transaction() as db:
        db.execute("INSERT INTO events (at, actor, action, subject, reason) VALUES (1, 'a', 'b', ?, '')", (subject,))


def subjects(store: Store) -> list[str]:
    return [row["subject"] for row in store.query("SELECT subject FROM events ORDER BY id")]


def schema(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
    connection.close()
    # A rebuilt table differs in quotes and spaces alone.
    return [(name, "".join(sql.replace('"', "").split())) for name, sql in rows]


@pytest.mark.parametrize("version", [0, *VERSIONS])
def test_a_database_of_every_earlier_schema_is_brought_up_to_date_with_its_rows(tmp_path: Path, version: int) -> None:
    old, new = Home(tmp_path / "old").create(), Home(tmp_path / "new")
    connection = sqlite3.connect(old.database)
    if version > 0:
        connection.executescript(frozen(version).read_text())
    connection.close()
    store = Store.open(old)
    assert store.schema_version == VERSIONS[-1] == Store.open(new).schema_version
    assert schema(old.database) == schema(new.database)
    assert not store.query("PRAGMA foreign_key_check")
    if version > 0:
        assert store.one("SELECT active FROM routes") == {"active": "0001-aaaaaaaa"}
        lineage = store.one(
            "SELECT r.caller FROM evaluations e JOIN adapters a ON a.name = e.candidate "
            "JOIN pairs p ON p.cycle_id = a.cycle_id JOIN candidates c ON c.id = p.chosen "
            "JOIN steps s ON s.id = c.step_id JOIN rollouts o ON o.id = s.rollout_id "
            "JOIN task_seeds t ON t.task_id = o.task_id "
            "JOIN requests r ON r.id = t.response_id"
        )
        assert lineage == {"caller": "alice"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_that_was_frozen_does_not_change(version: int) -> None:
    remedy = "a released migration must not change; before the first release delete the dump and run freeze_schema"
    assert frozen(version).exists(), "run `python -m tests.server.freeze_schema`"
    assert frozen(version).read_text() == dump_of(version), remedy


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    broken = migrations.Migration(1, "0001_broken.sql", "CREATE TABLE a (b);\nINSERT INTO nowhere VALUES (1);\n")
    with pytest.raises(sqlite3.OperationalError):
        migrations.migrate(connection, [broken])
    assert migrations.schema_version(connection) == 0
    assert connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,)
    migrations.migrate(connection, [migrations.Migration(1, "0001_whole.sql", "CREATE TABLE a (b);\n")])
    assert migrations.schema_version(connection) == 1


def test_statements_are_split_where_they_end() -> None:
    script = "-- a; b\nCREATE TABLE a (\n  b TEXT -- ; not here\n);\nINSERT INTO a VALUES (';');\n-- the end\n"
    assert len(list(migrations.statements(script))) == 2


def test_a_database_of_a_newer_program_is_refused_and_left_alone(store: Store) -> None:
    with store.transaction() as db:
        db.execute("PRAGMA user_version = 999")
    before = store.home.database.read_bytes()
    for migrate in (True, False):
        with pytest.raises(FailedPreconditionError, match=r"999.*upgrade nightschool"):
            Store.open(store.home, migrate=migrate)
    assert store.home.database.read_bytes() == before


def test_without_migrating_only_a_present_schema_is_opened(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(FailedPreconditionError, match="nightschool serve"):
        Store.open(home, migrate=False)
    home.create()
    sqlite3.connect(home.database).close()
    home.database.touch()
    with pytest.raises(FailedPreconditionError, match="schema version 0"):
        Store.open(home, migrate=False)
    Store.open(home)
    Store.open(home, migrate=False)


def test_processes_that_open_a_new_home_at_once_agree(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from nightschool_server.home import Home; from nightschool_server.store.store import Store\n"
        "sys.stdin.readline(); print(Store.open(Home(Path(sys.argv[1]))).schema_version)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "home")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[0].strip() for child in children] == [str(VERSIONS[-1])] * 4


def test_the_database_is_durable_and_checks_foreign_keys(store: Store) -> None:
    pragmas = {name: store.query(f"PRAGMA {name}")[0][name] for name in ("journal_mode", "synchronous", "foreign_keys")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as db:
        db.execute("INSERT INTO request_blobs VALUES ('nothing', 'nothing')")


def test_a_transaction_that_raises_takes_everything_back(store: Store) -> None:
    def fail_halfway() -> None:
        with store.transaction() as db:
            db.execute("INSERT INTO events (at, actor, action, subject, reason) VALUES (1, 'a', 'b', 'c', '')")
            assert subjects(store) == ["c"]
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail_halfway()
    assert subjects(store) == []
    note(store, "next")
    assert subjects(store) == ["next"]


def test_transactions_do_not_nest(store: Store) -> None:
    with store.transaction(), pytest.raises(AssertionError, match="nest"), store.transaction():
        pass


def test_threads_write_one_after_the_other_and_read_meanwhile(store: Store) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction() as db:
            db.execute("INSERT INTO events (at, actor, action, subject, reason) VALUES (1, 'a', 'b', 'first', '')")
            inside.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)
    waiters = [threading.Thread(target=note, args=(store, f"later {i}")) for i in range(8)]
    for waiter in waiters:
        waiter.start()
    assert subjects(store) == []
    leave.set()
    for thread in (holder, *waiters):
        thread.join(60)
    assert subjects(store)[0] == "first"
    assert len(subjects(store)) == 9


def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    insert = "INSERT INTO events (at, actor, action, subject, reason) VALUES (1, 'a', 'b', ?, '')"
    script = (
        "import sys; from pathlib import Path\n"
        "from nightschool_server.home import Home; from nightschool_server.store.store import Store\n"
        "store = Store.open(Home(Path(sys.argv[1]))); number = 0\n"
        "while True:\n"
        "    sha256 = store.put_blob(b'blob %d' % number, 'text/plain')\n"
        "    with store.transaction() as db:\n"
        f"        db.execute({insert!r}, (sha256,))\n"
        "    print(sha256, flush=True); number += 1\n"
    )
    home = Home(tmp_path / "home")
    with subprocess.Popen([sys.executable, "-c", script, str(home.path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().strip() for _ in range(25)]
        child.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
    store = Store.open(home)
    assert store.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    kept = subjects(store)
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) <= len(acknowledged) + 1
    for number, sha256 in enumerate(acknowledged):
        assert store.get_blob(sha256) == b"blob %d" % number


def test_a_blob_is_kept_once_under_its_hash(store: Store) -> None:
    sha256 = store.put_blob(b"abc", "text/plain")
    assert sha256 == hashlib.sha256(b"abc").hexdigest() == store.put_blob(b"abc", "text/plain")
    assert store.get_blob(sha256) == b"abc"
    assert store.blob_path(sha256) == store.home.blobs / sha256[:2] / sha256
    assert len(store.query("SELECT * FROM blobs")) == 1


@pytest.mark.parametrize("sha256", ["", "abc", "0" * 64, "../../etc/passwd", "A" * 64])
def test_an_unknown_blob_is_not_found(store: Store, sha256: str) -> None:
    assert not store.has_blob(sha256)
    with pytest.raises(NotFoundError, match="send the bytes again"):
        store.get_blob(sha256)


def test_a_damaged_or_lost_blob_is_not_found_until_it_is_put_again(store: Store) -> None:
    sha256 = store.put_blob(b"abc", "text/plain")
    store.blob_path(sha256).unlink()
    assert not store.has_blob(sha256)
    store.put_blob(b"abc", "text/plain")
    assert store.get_blob(sha256) == b"abc"
    store.blob_path(sha256).chmod(0o600)
    store.blob_path(sha256).write_bytes(b"abd")
    with pytest.raises(NotFoundError):
        store.get_blob(sha256)


def test_only_blobs_that_nothing_names_are_swept(store: Store) -> None:
    by_request, by_task, by_nobody = (store.put_blob(data, "text/plain") for data in (b"1", b"2", b"3"))
    with store.transaction() as db:
        db.execute(
            "INSERT INTO requests VALUES ('r', NULL, '', 'generate', 'alice', NULL, 'base', 'train', '{}', '[]', 'OK', "
            "'', 1, 0, 0, 0, 0, NULL, 1, 1)"
        )
        db.execute("INSERT INTO request_blobs VALUES ('r', ?)", (by_request,))
        db.execute(
            "INSERT INTO cycles (id, state, trigger, reason, created_at) VALUES ('c', 'running', 'manual', '', 1)"
        )
        db.execute(
            "INSERT INTO tasks (id, cycle_id, slot, prompt, images, state, raw, created_at) "
            "VALUES ('t', 'c', 0, '', json_array(?), 'kept', '[]', 1)",
            (by_task,),
        )
    leftover = store.blob_path(by_nobody).with_name(".tmp-leftover")
    leftover.write_bytes(b"half")
    assert store.sweep_blobs(older_than_s=3600) == 0
    assert leftover.exists()
    assert store.sweep_blobs(older_than_s=-1) == 1
    assert [store.has_blob(sha256) for sha256 in (by_request, by_task, by_nobody)] == [True, True, False]
    assert not leftover.exists()
    assert not store.blob_path(by_nobody).exists()


def test_sqlite_utils_reads_the_store_and_is_not_imported_before_that(store: Store) -> None:
    note(store, "a")
    assert [row["subject"] for row in store.db.table("events").rows] == ["a"]
    script = "import sys, nightschool_server.store.store; sys.exit('sqlite_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_connections_of_threads_that_ended_are_closed(store: Store) -> None:
    for _ in range(5):
        thread = threading.Thread(target=subjects, args=(store,))
        thread.start()
        thread.join(60)
    assert len(store._connections) <= 2
