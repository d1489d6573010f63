"""Erasing a caller: logged requests, what was derived from them, sessions, images, and the training files on disk.

Owns the order and the refusal while a cycle learns from the caller; the rows are `request_log.py`'s. What a trained
adapter has learned stays in its weights: delete the adapter to be rid of that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence

from nightschool_server.errors import FailedPreconditionError, InvalidRequestError
from nightschool_server.home import CORRECTIONS_FILE, REPORT_FILES, THUMBS_FILE, Home
from nightschool_server.runtime import Runtime
from nightschool_server.service.audit import audit
from nightschool_server.store.store import Store

PAIRS_FILE, ANCHORS_FILE = "pairs.jsonl", "anchors.jsonl"
"""In a cycle's folder: its training data, written by the learner's `pair_export.py`."""


async def forget_user(runtime: Runtime, actor: str, user: str) -> int:
    """Erase everything of the token name `user`. Returns how many requests.

    Raises InvalidRequestError without a name, FailedPreconditionError while a cycle learns from the requests.
    """
    if not user:
        raise InvalidRequestError("user", "user is empty: send the name of the token whose requests are to go")
    store = runtime.store
    _refuse_while_learning(store, user)
    cycles, shown = _cycles_from(store, user), _cycles_with_seeds_of(store, user)
    requests = await asyncio.to_thread(_requests_of, store, user)
    num_requests = await runtime.request_log.forget(user)
    runtime.registry.end_sessions_of(user)
    runtime.images.recent.forget_all()
    await asyncio.to_thread(_delete_training_files, runtime.home, cycles)
    await asyncio.to_thread(_delete_feedback, runtime.home, requests)
    await asyncio.to_thread(_delete_reports, runtime.home, {*cycles, *shown})
    with store.transaction() as db:
        audit(db, actor, "forget_user", user, "")
    return num_requests


def _refuse_while_learning(store: Store, user: str) -> None:
    """A running cycle's rows must not vanish under it."""
    row = store.one(
        "SELECT c.id FROM cycles c JOIN cycle_seeds s ON s.cycle_id = c.id JOIN requests r ON r.id = s.response_id "
        "WHERE c.state = 'running' AND r.caller = :user "
        # From its pairs stage on a cycle holds what callers said and pairs of earlier cycles, whosever its seeds are.
        "UNION SELECT c.id FROM cycles c JOIN stages g ON g.cycle_id = c.id "
        "WHERE c.state = 'running' AND g.name = 'pairs' AND g.state <> 'pending' AND EXISTS "
        " (SELECT 1 FROM requests r WHERE r.caller = :user AND (r.id IN (SELECT response_id FROM feedback) "
        "  OR r.id IN (SELECT response_id FROM task_seeds))) LIMIT 1",
        {"user": user},
    )
    if row is not None:
        raise FailedPreconditionError(
            f"cycle {row['id']} is learning from requests of {user!r}: cancel it or wait until it has ended"
        )


def _cycles_from(store: Store, user: str) -> list[str]:
    """Cycles with tasks that were written from the caller's requests."""
    rows = store.query(
        "SELECT DISTINCT t.cycle_id FROM tasks t JOIN task_seeds s ON s.task_id = t.id "
        "JOIN requests r ON r.id = s.response_id WHERE r.caller = ?",
        (user,),
    )
    return [row["cycle_id"] for row in rows]


def _cycles_with_seeds_of(store: Store, user: str) -> list[str]:
    """Cycles that chose requests of the caller, whatever came of them."""
    rows = store.query(
        "SELECT DISTINCT s.cycle_id FROM cycle_seeds s JOIN requests r ON r.id = s.response_id WHERE r.caller = ?",
        (user,),
    )
    return [row["cycle_id"] for row in rows]


def _delete_reports(home: Home, cycles: Iterable[str]) -> None:
    """The learner writes them anew, from the rows that are left."""
    for cycle_id in cycles:
        for name in REPORT_FILES.values():
            (home.cycles / cycle_id / name).unlink(missing_ok=True)


def _delete_training_files(home: Home, cycles: Sequence[str]) -> None:
    for cycle_id in cycles:
        for name in (PAIRS_FILE, ANCHORS_FILE):
            (home.cycles / cycle_id / name).unlink(missing_ok=True)
    for path in home.cycles.glob(f"*/{PAIRS_FILE}"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(json.loads(line).get("replayed_from") in cycles for line in lines):
            path.unlink()


def _requests_of(store: Store, user: str) -> frozenset[str]:
    return frozenset(row["id"] for row in store.query("SELECT id FROM requests WHERE caller = ?", (user,)))


def _delete_feedback(home: Home, requests: frozenset[str]) -> None:
    """Take the rows of these requests out of every cycle's files; a file without them stays as it is."""
    for path in (path for name in (CORRECTIONS_FILE, THUMBS_FILE) for path in home.cycles.glob(f"*/{name}")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["response_id"] not in requests]
        if len(kept) < len(lines):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)
