"""A model call as it happens: text deltas, typed events, and the whole reply at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Any

from nightschool_proto.v1 import agent_pb2

from nightschool.blocking import iterate, run
from nightschool.caller import Caller, Responses
from nightschool.content import Answer, Delta, Reply, Started, StreamEvent, Usage
from nightschool.convert import from_proto
from nightschool.errors import StreamClosedError
from nightschool.methods import STREAM_GENERATE

_NOT_ENDED = "the stream has not ended: read it to its end before its reply, which is not there once it was left early"


class AsyncStream:
    """`async for text in stream` gives the first answer's text as it is sampled; `stream.reply` is there afterwards.

    The call starts with the first event and can be read once. Leaving the loop, `aclose` and `async with` cancel the
    call at the server.
    """

    def __init__(self, caller: Caller, request: agent_pb2.GenerateRequest, timeout_s: float | None) -> None:
        self._caller = caller
        self._request = request
        self._timeout_s = timeout_s
        self._responses: Responses[Any, agent_pb2.StreamGenerateResponse] | None = None
        self._is_read = False
        self._started: Started | None = None
        self._reply: Reply | None = None

    def __aiter__(self) -> AsyncGenerator[str, None]:
        return self._texts()

    @property
    def reply(self) -> Reply:
        """The whole reply. Raises StreamClosedError before the stream's end."""
        if self._reply is None:
            raise StreamClosedError(_NOT_ENDED)
        return self._reply

    @property
    def started(self) -> Started | None:
        """The response_id and the adapter, as soon as the first event has arrived."""
        return self._started

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Every event: `Started`, the `Delta`s of all answers, each `Answer` as it ends, the `Reply` last."""
        if self._is_read:
            raise StreamClosedError("the stream was read before: a stream can be read once")
        self._is_read = True
        answers: list[Answer] = []
        try:
            self._responses = await self._caller.stream(STREAM_GENERATE, self._request, self._timeout_s)
            while (response := await self._responses.next()) is not None:
                kind = response.WhichOneof("event")
                if kind == "started":
                    self._started = from_proto(Started, response.started)
                    yield self._started
                elif kind == "delta":
                    yield from_proto(Delta, response.delta)
                elif kind == "finished":
                    answers.append(from_proto(Answer, response.finished))
                    yield answers[-1]
                elif kind == "usage":
                    self._reply = self._reply_of(answers, from_proto(Usage, response.usage))
                    yield self._reply
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Cancel the call, if it still runs."""
        self._is_read = True
        if self._responses is not None:
            self._responses.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        await self.aclose()

    async def _texts(self) -> AsyncGenerator[str, None]:
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, Delta) and event.index == 0 and event.text:
                    yield event.text

    def _reply_of(self, answers: list[Answer], usage: Usage) -> Reply:
        started = self._started or Started("", "")
        ordered = tuple(sorted(answers, key=lambda answer: answer.index))
        return Reply(started.response_id, started.adapter, ordered, usage)


class Stream:
    """`for text in stream` gives the first answer's text as it is sampled; `stream.reply` is there afterwards.

    The call starts with the first event and can be read once. Leaving the loop, `close` and `with` cancel the call at
    the server.
    """

    def __init__(self, inner: AsyncStream) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[str]:
        return iterate(self._inner.__aiter__())

    @property
    def reply(self) -> Reply:
        """The whole reply. Raises StreamClosedError before the stream's end."""
        return self._inner.reply

    @property
    def started(self) -> Started | None:
        """The response_id and the adapter, as soon as the first event has arrived."""
        return self._inner.started

    def events(self) -> Iterator[StreamEvent]:
        """Every event: `Started`, the `Delta`s of all answers, each `Answer` as it ends, the `Reply` last."""
        return iterate(self._inner.events())

    def close(self) -> None:
        """Cancel the call, if it still runs; another thread may do this."""
        run(self._inner.aclose())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
