"""The request log: what is kept under which policy, what is durable when, and that a request never waits for it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nightschool_server.chat import Message, Text, messages_from_json, user
from nightschool_server.errors import AlreadyExistsError, NotFoundError, OverloadedError
from nightschool_server.home import Home
from nightschool_server.store.redact import keep_all
from nightschool_server.store.request_log import Feedback, LoggedMessage, RequestLog
from nightschool_server.store.request_rows import delete_old_replies
from nightschool_server.store.store import Store

from tests.server.log_records import record

REPOSITORY = Path(__file__).parents[2]
PNG = b"\x89PNG picture"
SHA256 = hashlib.sha256(PNG).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(Home(tmp_path / "home"))


@pytest_asyncio.fixture
async def log(store: Store) -> AsyncIterator[RequestLog]:
    made = RequestLog(store, queue_size=4)
    yield made
    made.close()


def ids(store: Store) -> list[str]:
    return [row["id"] for row in store.query("SELECT id FROM requests ORDER BY rowid")]


async def test_a_record_is_kept_whole(store: Store, log: RequestLog) -> None:
    await log.write(record("r1", session_id="s1", request_id="k", outcome="answered", num_steps=3, num_tool_errors=1))
    row = store.one("SELECT * FROM requests")
    assert row is not None
    expected = {
        "id": "r1",
        "request_id": "k",
        "digest": "d",
        "method": "generate",
        "caller": "alice",
        "session_id": "s1",
    }
    expected |= {"adapter": "base", "policy": "train", "status": "OK", "outcome": "answered", "response": b"reply"}
    assert row | expected == row
    assert (row["num_steps"], row["num_tool_errors"], row["prompt_tokens"]) == (3, 1, 3)
    assert (json.loads(row["sampling"]), json.loads(row["tools"])) == ({"max_tokens": 5}, [{"name": "add"}])
    messages = store.query("SELECT role, parts, sampled FROM messages ORDER BY position")
    assert [(m["role"], m["sampled"]) for m in messages] == [("user", 0), ("assistant", 1)]
    (read,) = messages_from_json(f'[{{"role": "user", "parts": {messages[0]["parts"]}}}]')
    assert read == user("How many apples?")


async def test_images_become_blobs_that_the_request_names(store: Store, log: RequestLog) -> None:
    message = user("What colour?", [SHA256])
    await log.write(record("r1", messages=(LoggedMessage(message),), images={SHA256: PNG}))
    assert store.get_blob(SHA256) == PNG
    assert store.one("SELECT media_type FROM blobs") == {"media_type": "image/png"}
    await log.write(record("r2", messages=(LoggedMessage(message),)))
    assert [row["response_id"] for row in store.query("SELECT * FROM request_blobs")] == ["r1", "r2"]


async def test_under_no_log_nothing_of_the_content_is_kept(store: Store, log: RequestLog) -> None:
    secret = "the secret question"
    changes = {"policy": "no_log", "request_id": "k", "images": {SHA256: PNG}, "response": secret.encode()}
    await log.write(record("r1", secret, sampling={"stop": secret}, tools=({"name": secret},), **changes))
    await log.write(record("r2", secret, **changes))
    assert ids(store) == ["r1", "r2"]
    row = store.one("SELECT caller, adapter, policy, prompt_tokens, response, request_id, digest FROM requests")
    assert row == {
        "caller": "alice", "adapter": "base", "policy": "no_log", "prompt_tokens": 3, "response": None,
        "request_id": None, "digest": "",
    }  # fmt: skip
    await log.feedback(Feedback("r1", "alice", good=False, comment=secret, correction=secret))
    assert store.one("SELECT good, comment FROM feedback") == {"good": 0, "comment": ""}
    log.close()
    store.query("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not [p for p in store.home.path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
    assert not store.has_blob(SHA256)


async def test_text_is_redacted_before_it_is_stored(store: Store, log: RequestLog) -> None:
    await log.write(record("r1", "Write to ann@example.org"))
    assert "[email]" in store.query("SELECT parts FROM messages")[0]["parts"]
    await log.feedback(Feedback("r1", "alice", comment="ask bob@example.org", correction="eve@example.org"))
    assert store.one("SELECT comment, correction FROM feedback") == {"comment": "ask [email]", "correction": "[email]"}
    unredacted = RequestLog(store, 4, keep_all)
    await unredacted.write(record("r2", "Write to ann@example.org"))
    unredacted.close()
    assert "ann@example.org" in store.query("SELECT parts FROM messages WHERE response_id = 'r2'")[0]["parts"]


async def test_a_full_queue_drops_the_line_and_counts_it_and_holds_nobody_up(store: Store, log: RequestLog) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction():
            inside.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)
    # The writer waits for the lock with at most one full queue in hand, and a second one waits for the writer.
    offered = [log.offer(record(f"r{number}")) for number in range(20)]
    assert offered[:4] == [True] * 4
    assert 4 <= offered.count(True) <= 8
    waiting = asyncio.create_task(log.write(record("durable", request_id="k")))
    await asyncio.sleep(0)
    assert log.counts().num_dropped == offered.count(False)
    leave.set()
    await waiting
    holder.join(60)
    assert ids(store) == [f"r{number}" for number, kept in enumerate(offered) if kept] + ["durable"]


async def test_a_record_that_cannot_be_written_takes_no_other_with_it(store: Store, log: RequestLog) -> None:
    await log.write(record("r1", request_id="k"))
    results = await asyncio.gather(
        log.write(record("r2")),
        log.write(record("r3", request_id="k")),
        log.write(record("r4", caller="bob", request_id="k")),
        log.feedback(Feedback("nothing", "alice", good=True)),
        log.write(record("r5")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [
        type(None),
        AlreadyExistsError,
        type(None),
        NotFoundError,
        type(None),
    ]
    assert ids(store) == ["r1", "r2", "r4", "r5"]
    assert log.offer(record("r1"))
    await log.flush()
    assert log.counts().num_dropped == 1


async def test_a_reply_is_found_by_its_callers_key_for_a_day(store: Store, log: RequestLog) -> None:
    await log.write(record("r1", request_id="k"))
    await log.write(record("failed", request_id="f", status="INTERNAL", response=None))
    await log.write(record("unkeyed"))
    found = log.find_by_request_id("alice", "k")
    assert found is not None
    assert (found.response_id, found.digest, found.response) == ("r1", "d", b"reply")
    assert log.find_by_request_id("bob", "k") is None
    assert log.find_by_request_id("alice", "f") is None, "a failed request may be tried again under its key"
    assert store.one("SELECT response FROM requests WHERE id = 'unkeyed'") == {"response": None}
    await log.write(record("again", request_id="f"))
    with store.transaction() as db:
        assert delete_old_replies(db, before=time.time() + 1) == 2
    assert log.find_by_request_id("alice", "k") is None


async def test_feedback_given_twice_is_kept_once(store: Store, log: RequestLog) -> None:
    log.offer(record("r1"))
    said = Feedback("r1", "alice", score=0.25, comment="meh", request_id="k")
    first, second = await asyncio.gather(log.feedback(said), log.feedback(said))
    assert first == second == await log.feedback(said)
    with pytest.raises(AlreadyExistsError, match="other feedback"):
        await log.feedback(Feedback("r1", "alice", score=0.5, comment="meh", request_id="k"))
    assert await log.feedback(Feedback("r1", "alice", good=True)) != await log.feedback(
        Feedback("r1", "alice", good=True)
    )
    assert log.counts().num_feedback == 3


async def test_feedback_is_for_ones_own_answers(log: RequestLog) -> None:
    await log.write(record("r1"))
    with pytest.raises(NotFoundError, match="not in the request log"):
        await log.feedback(Feedback("r1", "bob", good=True))
    assert await log.feedback(Feedback("r1", "root", good=True, of_any_caller=True))
    with pytest.raises(NotFoundError):
        await log.feedback(Feedback("unknown", "alice", good=True))


async def test_what_a_caller_said_is_erased_with_what_was_made_of_it(store: Store, log: RequestLog) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    await log.write(record("a1", images={SHA256: PNG, other: b"other"}))
    await log.write(record("b1", caller="bob", images={other: b"other"}))
    await log.feedback(Feedback("a1", "alice", good=False))
    await log.feedback(Feedback("b1", "bob", good=True))
    with store.transaction() as db:
        db.execute(
            "INSERT INTO cycles (id, state, trigger, reason, created_at) VALUES ('c', 'running', 'manual', '', 1)"
        )
        for slot, seeds in enumerate((["a1", "b1"], ["b1"])):
            db.execute(
                "INSERT INTO tasks (id, cycle_id, slot, prompt, images, state, raw, created_at) "
                "VALUES (?, 'c', ?, '', '[]', 'kept', '[]', 1)",
                (f"t{slot}", slot),
            )
            db.executemany("INSERT INTO task_seeds VALUES (?, ?)", [(f"t{slot}", seed) for seed in seeds])
            db.execute(
                "INSERT INTO rollouts VALUES (?, 'c', ?, 'base', 'done', '', '', 1, 2)", (f"o{slot}", f"t{slot}")
            )
    log.offer(record("a2"))
    assert await log.forget("alice") == 2
    assert ids(store) == ["b1"]
    assert [row["id"] for row in store.query("SELECT id FROM tasks")] == ["t1"]
    assert [row["id"] for row in store.query("SELECT id FROM rollouts")] == ["o1"]
    assert [row["caller"] for row in store.query("SELECT caller FROM feedback")] == ["bob"]
    assert (store.has_blob(SHA256), store.has_blob(other)) == (False, True)
    assert await log.forget("alice") == 0


async def test_what_was_erased_is_in_no_file(store: Store, log: RequestLog) -> None:
    secret = "a secret that nobody may find " * 300
    await log.write(record("a1", secret, request_id="k", response=secret.encode()))
    await log.forget("alice")
    assert not [p for p in store.home.path.rglob("*") if p.is_file() and b"nobody may find" in p.read_bytes()]


async def test_heavy_lines_fill_the_queue_before_it_is_long(store: Store) -> None:
    log = RequestLog(store, max_queued_image_bytes=100)
    assert not log.offer(record("r1", images={"x": bytes(101)}))
    assert log.counts().num_dropped == 1
    for number in range(3):
        assert log.offer(record(f"s{number}", images={"x": bytes(60)}))
        await log.flush()
    log.close()


async def test_closing_writes_what_is_queued_and_then_refuses(store: Store) -> None:
    log = RequestLog(store, queue_size=1000)
    for number in range(600):
        assert log.offer(record(f"r{number}"))
    log.close()
    log.close()
    assert len(ids(store)) == 600
    assert not log.offer(record("late"))
    with pytest.raises(OverloadedError, match="shutting down"):
        await log.write(record("late"))


async def test_a_caller_that_gave_up_waiting_has_its_record_written(store: Store, log: RequestLog) -> None:
    writing = asyncio.create_task(log.write(record("r1", request_id="k")))
    await asyncio.sleep(0)
    writing.cancel()
    await log.flush()
    assert ids(store) == ["r1"]


async def test_messages_of_every_kind_are_logged_as_they_were(store: Store, log: RequestLog) -> None:
    message = Message("assistant", (Text('<tool_call>{"name": "añadir"}</tool_call>\n'),))
    await log.write(record("r1", messages=(LoggedMessage(message, sampled=True),)))
    (row,) = store.query("SELECT role, parts FROM messages")
    assert messages_from_json(f'[{{"role": "{row["role"]}", "parts": {row["parts"]}}}]') == (message,)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    command = [sys.executable, "-m", "tests.server.log_child", str(home.path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().split() for _ in range(20)]
        child.send_signal(signal.SIGKILL)
        acknowledged += [line.split() for line in child.stdout if line.endswith("\n")]
    store = Store.open(home)
    assert store.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    for number, (name, feedback_id) in enumerate(acknowledged, start=1):
        assert store.one("SELECT response FROM requests WHERE id = ?", (name,)) == {"response": b"reply"}
        assert store.one("SELECT response_id FROM feedback WHERE id = ?", (feedback_id,)) == {"response_id": name}
        assert store.get_blob(hashlib.sha256(b"image %d" % number).hexdigest()) == b"image %d" % number
    offered = store.query("SELECT COUNT(*) AS n FROM requests WHERE id LIKE 'offered%'")[0]["n"]
    assert offered >= 5 * len(acknowledged), "a line that was queued before an acknowledged one is there, too"
    store.close()
