"""A logged request as rows: what is kept of it under its policy, and the SQL that writes, finds and erases it.

Every function here runs inside a transaction of the caller (`request_log.py`'s writer thread), but for the reads.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nightschool_server.chat import Message, canonical_json, messages_to_json
from nightschool_server.errors import AlreadyExistsError, NotFoundError
from nightschool_server.ids import new_id
from nightschool_server.store.redact import Redactor, redact_message
from nightschool_server.store.store import Row, Store

Policy = Literal["train", "log_only", "no_log"]


@dataclass(frozen=True)
class LoggedMessage:
    """One turn of a request."""

    message: Message
    sampled: bool = False
    """Whether the model wrote it in this request; otherwise the caller sent it or a tool gave it."""


@dataclass(frozen=True)
class RequestRecord:
    """All that the log is told of one request; its policy decides what is kept."""

    id: str
    """The response_id that the caller was given."""
    method: Literal["generate", "stream", "task"]
    caller: str
    adapter: str
    policy: Policy
    status: str
    """gRPC status name, OK for an answered one."""
    created_at: float
    ended_at: float
    request_id: str | None = None
    """The caller's idempotency key."""
    digest: str = ""
    """Of the request, to tell a repeat from another request under the same key."""
    session_id: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    outcome: str = ""
    """Of a task: how the episode ended."""
    num_steps: int = 1
    num_tool_errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    response: bytes | None = None
    """The serialised reply, for repeats. Kept only beside a request_id."""
    messages: tuple[LoggedMessage, ...] = ()
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by sha256 of the images that the store may not hold yet."""

    @property
    def image_bytes(self) -> int:
        """Memory that its images take while it waits."""
        return sum(len(data) for data in self.images.values())


@dataclass(frozen=True)
class StoredReply:
    """The reply to a request that came with an idempotency key."""

    response_id: str
    digest: str
    response: bytes


@dataclass(frozen=True)
class Feedback:
    """What a caller says of an answer."""

    response_id: str
    caller: str
    good: bool | None = None
    score: float | None = None
    comment: str = ""
    correction: str = ""
    request_id: str | None = None
    """Idempotency key."""
    of_any_caller: bool = False
    """Whether `caller` may speak of answers that others were given (the admin scope)."""


def kept_of(record: RequestRecord, redactor: Redactor) -> RequestRecord:
    """What may be stored of `record`: under NO_LOG nothing of its content, else its messages redacted.

    A key without a reply is not kept either: the caller may try a failed request again under the same key.
    """
    if record.policy == "no_log":
        return replace(
            record, request_id=None, digest="", sampling={}, tools=(), response=None, messages=(), images={}
        )  # fmt: skip
    repeatable = record.request_id is not None and record.response is not None
    return replace(
        record,
        request_id=record.request_id if repeatable else None,
        response=record.response if repeatable else None,
        messages=tuple(replace(one, message=redact_message(one.message, redactor)) for one in record.messages),
    )


def insert_request(db: sqlite3.Connection, record: RequestRecord) -> None:
    """Write one record with its messages; the blobs of its images are stored already."""
    values = {
        "id": record.id,
        "request_id": record.request_id,
        "digest": record.digest,
        "method": record.method,
        "caller": record.caller,
        "session_id": record.session_id,
        "adapter": record.adapter,
        "policy": record.policy,
        "sampling": canonical_json(dict(record.sampling)),
        "tools": canonical_json([dict(tool) for tool in record.tools]),
        "status": record.status,
        "outcome": record.outcome,
        "num_steps": record.num_steps,
        "num_tool_errors": record.num_tool_errors,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "response": record.response,
        "created_at": record.created_at,
        "ended_at": record.ended_at,
    }
    db.execute(_INSERT_REQUEST, values)
    db.executemany(
        "INSERT INTO messages (response_id, position, role, parts, sampled) VALUES (?, ?, ?, ?, ?)",
        [
            (record.id, position, one.message.role, _parts_json(one.message), one.sampled)
            for position, one in enumerate(record.messages)
        ],
    )
    named = [one.message for one in record.messages]
    hashes = {sha256 for message in named for sha256 in message.images} | set(record.images)
    hashes |= {file.sha256 for message in named for file in message.files}
    db.executemany(
        # A blob that was erased in between leaves the request without it.
        "INSERT OR IGNORE INTO request_blobs (response_id, sha256) SELECT ?, sha256 FROM blobs WHERE sha256 = ?",
        [(record.id, sha256) for sha256 in sorted(hashes)],
    )


def insert_feedback(store: Store, db: sqlite3.Connection, feedback: Feedback, redactor: Redactor) -> str:
    """Write feedback and return its id; the same again under the same key returns the first one's id.

    Raises NotFoundError for a response that is not in the log or is another caller's, AlreadyExistsError for a key that
    was used for other feedback.
    """
    comment, correction = redactor(feedback.comment), redactor(feedback.correction)
    good = None if feedback.good is None else int(feedback.good)
    said = (feedback.response_id, good, feedback.score, comment, correction)
    if feedback.request_id is not None:
        before = store.one(
            "SELECT * FROM feedback WHERE caller = ? AND request_id = ?", (feedback.caller, feedback.request_id)
        )
        if before is not None:
            if said == tuple(before[name] for name in ("response_id", "good", "score", "comment", "correction")):
                return str(before["id"])
            raise AlreadyExistsError(
                f"request_id {feedback.request_id!r} was used for other feedback: use a fresh one every time"
            )
    request = store.one("SELECT caller, policy FROM requests WHERE id = ?", (feedback.response_id,))
    if request is None or not (feedback.of_any_caller or request["caller"] == feedback.caller):
        raise NotFoundError(
            "response",
            feedback.response_id,
            f"response {feedback.response_id!r} is not in the request log: check response_id "
            "(a full log queue also drops lines, see `nightschool status`)",
        )
    feedback_id = new_id("fb")
    if request["policy"] == "no_log":
        comment = correction = ""
    db.execute(
        "INSERT INTO feedback (id, response_id, request_id, caller, good, score, comment, correction, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(feedback_id, feedback.response_id, feedback.request_id, feedback.caller),
            *(good, feedback.score, comment, correction, time.time()),
        ),
    )
    return feedback_id


def delete_caller(store: Store, db: sqlite3.Connection, caller: str) -> tuple[int, list[str]]:
    """Erase a caller's requests, feedback, sessions and replies, and every task that was written from them, with its
    rollouts and pairs. Returns how many requests, and the blobs that were named or held."""
    blobs = store.query(
        "SELECT b.sha256 FROM request_blobs b JOIN requests r ON r.id = b.response_id WHERE r.caller = ? "
        "UNION SELECT sha256 FROM blob_holders WHERE caller = ? "
        "UNION SELECT b.sha256 FROM task_blobs b JOIN task_seeds s ON s.task_id = b.task_id "
        "JOIN requests r ON r.id = s.response_id WHERE r.caller = ?",
        (caller, caller, caller),
    )
    db.execute(
        "DELETE FROM tasks WHERE id IN (SELECT s.task_id FROM task_seeds s JOIN requests r ON r.id = s.response_id "
        "WHERE r.caller = ?)",
        (caller,),
    )
    num_requests = db.execute("DELETE FROM requests WHERE caller = ?", (caller,)).rowcount
    for table in ("feedback", "sessions", "replies", "blob_holders"):
        db.execute(f"DELETE FROM {table} WHERE caller = ?", (caller,))
    return num_requests, [row["sha256"] for row in blobs]


def delete_old_holders(db: sqlite3.Connection, before: float) -> int:
    """Let go of blobs that callers have held since before then. Returns how many."""
    return db.execute("DELETE FROM blob_holders WHERE created_at < ?", (before,)).rowcount


def delete_old_replies(db: sqlite3.Connection, before: float) -> int:
    """Forget replies, and with them the idempotency keys, of requests that ended before then. Returns how many."""
    return db.execute(
        "UPDATE requests SET response = NULL, request_id = NULL WHERE request_id IS NOT NULL AND ended_at < ?",
        (before,),
    ).rowcount


def find_reply(store: Store, caller: str, request_id: str) -> StoredReply | None:
    """The reply that `caller` got under this key, if it is still kept."""
    row: Row | None = store.one(
        "SELECT id, digest, response FROM requests WHERE caller = ? AND request_id = ? AND response IS NOT NULL",
        (caller, request_id),
    )
    return None if row is None else StoredReply(row["id"], row["digest"], row["response"])


def media_type_of(data: bytes) -> str:
    """Of an encoded image, by its first bytes."""
    if data.startswith(b"\x89PNG"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if data.startswith(b"GIF8"):
        return "image/gif"
    if data[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


def _parts_json(message: Message) -> str:
    """The parts alone, as a JSON list; `chat.messages_to_json` knows how each is written."""
    return canonical_json(json.loads(messages_to_json([message]))[0]["parts"])


_COLUMNS = (
    *("id", "request_id", "digest", "method", "caller", "session_id", "adapter", "policy", "sampling", "tools"),
    *("status", "outcome", "num_steps", "num_tool_errors", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("response", "created_at", "ended_at"),
)
_INSERT_REQUEST = (
    f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{column}' for column in _COLUMNS)})"
)
