"""Replies to admin writes by idempotency key: a repeated call gets the first one's reply."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nightschool_server.errors import AlreadyExistsError
from nightschool_server.store.store import Store

KEEP_S = 7 * 24 * 3600.0
"""How long a key is remembered."""


@dataclass(frozen=True)
class ReplyKey:
    """What makes two calls the same call."""

    caller: str
    request_id: str
    method: str
    digest: str
    """Of the request."""


class Replies:
    """The table `replies`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: ReplyKey) -> bytes | None:
        """The reply that was given, or None. Raises AlreadyExistsError where the id was used for another call."""
        row = self._store.one(
            "SELECT method, digest, response FROM replies WHERE caller = ? AND request_id = ?",
            (key.caller, key.request_id),
        )
        if row is None:
            return None
        if (row["method"], row["digest"]) != (key.method, key.digest):
            raise AlreadyExistsError(
                f"request_id {key.request_id!r} was used for another call ({row['method']}): use a fresh one every time"
            )
        return bytes(row["response"])

    def put(self, key: ReplyKey, response: bytes) -> bytes:
        """Remember the reply, durably, and return the one that counts: the first. Raises AlreadyExistsError."""
        now = time.time()
        with self._store.transaction() as db:
            db.execute("DELETE FROM replies WHERE created_at < ?", (now - KEEP_S,))
            before = self.get(key)
            if before is not None:
                return before
            db.execute(
                "INSERT INTO replies (caller, request_id, method, digest, response, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key.caller, key.request_id, key.method, key.digest, response, now),
            )
        return response
