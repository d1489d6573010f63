"""Admin writes with a request_id happen once: a repeat gets the first one's reply, two at once share one execution."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage

from nightschool_server.service.interceptors import current_caller
from nightschool_server.service.repeats import Answered, Repeats
from nightschool_server.service.replies import Replies, ReplyKey
from nightschool_server.service.wire import identifier

Reply = TypeVar("Reply", bound=ProtoMessage)


class Once:
    """Runs an admin write unless it was answered before."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._repeats = Repeats()

    async def __call__(self, request: Any, reply_class: type[Reply], write: Callable[[], Awaitable[Reply]]) -> Reply:
        """The reply of `write`, or of the first call with this request_id. Raises AlreadyExistsError."""
        if not identifier(request.request_id, "request_id"):
            return await write()
        key = _key(request)

        async def find() -> Answered | None:
            stored = self._replies.get(key)
            return None if stored is None else Answered(key.digest, stored)

        async with self._repeats.claim(key.caller, key.request_id, key.digest, find) as claim:
            if claim.response is None:
                reply = await write()
                claim.response = self._replies.put(key, reply.SerializeToString())
            return reply_class.FromString(claim.response)


def _key(request: Any) -> ReplyKey:
    plain = copy.copy(request)
    plain.ClearField("request_id")
    digest = hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()
    return ReplyKey(current_caller().name, request.request_id, request.DESCRIPTOR.name, digest)
