"""What became of a model call, and how the request log is told.

Logging follows the answer and is never waited for, but for a request with a request_id: its record is on disk
before the reply leaves, so that a repeat finds it after any crash. Owns the policy (what of a call may be kept);
the log's rows and its writer are `store/request_log.py`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

import grpc
from nightschool_proto.v1 import content_pb2

from nightschool_server import chat, engine
from nightschool_server.agent import episode
from nightschool_server.errors import NightschoolError
from nightschool_server.service.repeats import Answered, Claim, Repeats
from nightschool_server.service.status import SERVER_FAULTS, row_of
from nightschool_server.service.wire import ModelCall, Policy
from nightschool_server.service.wire_replies import AnswersSoFar
from nightschool_server.store.request_log import LoggedMessage, RequestLog, RequestRecord

Method = Literal["generate", "stream", "task"]


@dataclass
class Served:
    """One model call, as far as it went."""

    response_id: str
    method: Method
    caller: str
    call: ModelCall
    adapter: str
    started_at: float = field(default_factory=time.time)
    status: str = "OK"
    """gRPC status name."""
    outcome: str = ""
    """Of a task: how the episode ended."""
    turns: tuple[chat.Message, ...] = ()
    """What came after the caller's messages: answers and observations."""
    num_steps: int = 1
    num_tool_errors: int = 0
    usage: content_pb2.Usage = field(default_factory=content_pb2.Usage)
    images: Mapping[str, bytes] = field(default_factory=dict)
    """That tools gave back, by sha256."""

    def end_with_answer(self, so_far: AnswersSoFar) -> None:
        """Take in what was sampled; of several answers the first is the turn that is logged."""
        self.turns = (chat.assistant(so_far.answers[0].text),)
        self.usage = so_far.usage()

    def end_with(self, result: episode.EpisodeResult) -> None:
        """Take in how a task ended."""
        self.outcome = result.outcome
        self.turns = result.messages
        self.num_steps = result.num_steps
        self.num_tool_errors = result.num_tool_errors
        self.usage = usage_of(result.usage)
        self.images = {sha256: data for step in result.steps for sha256, data in step.execution.images.items()}


class Recorder:
    """Tells the request log what was served, as far as the caller allows."""

    def __init__(self, request_log: RequestLog, default_policy: Policy) -> None:
        self._log = request_log
        self._default_policy = default_policy
        self._repeats = Repeats()

    def policy_of(self, call: ModelCall) -> Policy:
        """The caller's policy, else the server's; practice is not logged unless it asks to be."""
        if call.policy is not None:
            return call.policy
        return "no_log" if call.priority == engine.PRACTICE_PRIORITY else self._default_policy

    @asynccontextmanager
    async def claim(self, caller: str, call: ModelCall) -> AsyncIterator[Claim]:
        """The right to answer `call`, or the answer that its request_id has already; see `Repeats.claim`."""
        if not call.request_id:
            yield Claim(None)
            return

        async def find() -> Answered | None:
            stored = self._log.find_by_request_id(caller, call.request_id)
            return None if stored is None else Answered(stored.digest, stored.response)

        async with self._repeats.claim(caller, call.request_id, call.digest, find) as claim:
            yield claim

    def failed(self, served: Served, error: BaseException) -> None:
        """Log a call that was cut off or that the server failed; its request_id is free to be tried again.

        A caller's mistake is not logged: nothing was answered and there is nothing to learn.
        """
        if isinstance(error, NightschoolError):
            code = row_of(error).code
        else:
            cut = isinstance(error, (asyncio.CancelledError, GeneratorExit))
            code = grpc.StatusCode.CANCELLED if cut else grpc.StatusCode.INTERNAL
        if code is grpc.StatusCode.CANCELLED or code in SERVER_FAULTS:
            served.status = code.name
            self._log.offer(self._record(served, None))

    async def save(self, served: Served, response: bytes) -> None:
        """Log an answered call before its reply leaves: durably where a repeat may ask for it."""
        if served.call.request_id and self.policy_of(served.call) != "no_log":
            await self._log.write(self._record(served, response))
        else:
            self._log.offer(self._record(served, None))

    def _record(self, served: Served, response: bytes | None) -> RequestRecord:
        call = served.call
        sent = [LoggedMessage(message) for message in call.messages]
        came = [LoggedMessage(message, sampled=message.role == "assistant") for message in served.turns]
        return RequestRecord(
            id=served.response_id,
            method=served.method,
            caller=served.caller,
            adapter=served.adapter,
            policy=self.policy_of(call),
            status=served.status,
            created_at=served.started_at,
            ended_at=time.time(),
            request_id=call.request_id or None,
            digest=call.digest,
            session_id=call.session_id or None,
            sampling=asdict(call.sampling),
            tools=tuple(_logged(tool) for tool in call.tools),
            outcome=served.outcome,
            num_steps=served.num_steps,
            num_tool_errors=served.num_tool_errors,
            prompt_tokens=served.usage.prompt_tokens,
            completion_tokens=served.usage.completion_tokens,
            cached_tokens=served.usage.cached_tokens,
            response=response,
            messages=(*sent, *came),
            images={**{image.sha256: image.data for image in call.images.sent.values()}, **served.images},
        )


def _logged(tool: chat.ToolSpec) -> dict[str, object]:
    """The tool as its row holds it; rows of older versions have no `strict`."""
    return {"name": tool.name, "description": tool.description, "parameters": tool.schema, "strict": tool.strict}


def usage_of(usage: episode.Usage) -> content_pb2.Usage:
    """Usage on the wire."""
    return content_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
