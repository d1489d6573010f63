"""A task as it happens: the server runs the agent loop, this client runs the tools that it brought."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool.blocking import iterate, run
from nightschool.caller import Caller, Responses
from nightschool.content import (
    Delta,
    File,
    Message,
    Outcome,
    Started,
    TaskEvent,
    TaskResult,
    ToolCall,
    ToolCalled,
    ToolResult,
    ToolReturned,
    Usage,
)
from nightschool.convert import enum_member, from_proto, message_of
from nightschool.errors import InternalError, StreamClosedError
from nightschool.files import LocalFile, file_protos
from nightschool.messages import tool_result_proto
from nightschool.methods import RUN_TASK
from nightschool.tools import Tool, run_tool

TaskResponses = Responses[agent_pb2.RunTaskRequest, agent_pb2.RunTaskResponse]


class AsyncTaskRun:
    """`async for event in run` gives what happens, a `TaskResult` last; `await run.result()` only that.

    The call starts with the first event and can be read once. Leaving the loop, `aclose` and `async with` cancel it.
    """

    def __init__(
        self,
        caller: Caller,
        request: agent_pb2.RunTaskRequest,
        *,
        tools: Sequence[Tool],
        files: Sequence[LocalFile],
        timeout_s: float | None,
    ) -> None:
        self._caller = caller
        self._request = request
        self._files = files
        self._tools = {tool.name: tool for tool in tools}
        self._timeout_s = timeout_s
        self._responses: TaskResponses | None = None
        self._is_read = False
        self._started = Started("", "")
        self._result: TaskResult | None = None

    def __aiter__(self) -> AsyncGenerator[TaskEvent, None]:
        return self._events()

    async def result(self) -> TaskResult:
        """How the task ended; runs it to its end. Raises StreamClosedError for a run that was left early."""
        if self._result is None:
            async with aclosing(self._events()) as events:
                async for _ in events:
                    pass
        if self._result is None:
            raise InternalError("the server ended the task without a result: see its log")
        return self._result

    async def aclose(self) -> None:
        """Cancel the task, if it still runs."""
        self._is_read = True
        if self._responses is not None:
            self._responses.cancel()

    async def __aenter__(self) -> AsyncTaskRun:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        await self.aclose()

    async def _events(self) -> AsyncGenerator[TaskEvent, None]:
        if self._is_read:
            raise StreamClosedError("the run was read or closed before: a run can be read once")
        self._is_read = True
        try:
            self._request.start.files.extend(await file_protos(self._caller, self._files, self._timeout_s))
            self._responses = await self._caller.stream(RUN_TASK, self._request, self._timeout_s, duplex=True)
            while (response := await self._responses.next()) is not None:
                if response.WhichOneof("event") == "tool_request":
                    await self._answer(self._responses, response.tool_request)
                elif (event := self._event_of(response)) is not None:
                    yield event
        finally:
            await self.aclose()

    async def _answer(self, responses: TaskResponses, request: content_pb2.ToolCall) -> None:
        result = await run_tool(self._tools, from_proto(ToolCall, request), self._caller.transport)
        await responses.send(agent_pb2.RunTaskRequest(tool_result=tool_result_proto(result)))

    def _event_of(self, response: agent_pb2.RunTaskResponse) -> TaskEvent | None:
        """The event of a response, None for one of a kind that this client does not know."""
        kind = response.WhichOneof("event")
        if kind == "started":
            self._started = from_proto(Started, response.started)
            return self._started
        if kind == "delta":
            return from_proto(Delta, response.delta)
        if kind == "tool_call":
            return ToolCalled(from_proto(ToolCall, response.tool_call))
        if kind == "tool_result":
            return ToolReturned(from_proto(ToolResult, response.tool_result))
        if kind == "finished":
            self._result = self._result_of(response.finished)
            return self._result
        return None

    def _result_of(self, finished: agent_pb2.TaskFinished) -> TaskResult:
        messages: tuple[Message, ...] = tuple(message_of(message) for message in finished.messages)
        return TaskResult(
            response_id=self._started.response_id,
            adapter=self._started.adapter,
            outcome=enum_member(Outcome, finished, "outcome"),
            answer=finished.answer,
            num_steps=finished.num_steps,
            usage=from_proto(Usage, finished.usage),
            messages=messages,
            files=tuple(from_proto(File, file) for file in finished.files),
        )


class TaskRun:
    """`for event in run` gives what happens, a `TaskResult` last; `run.result()` only that.

    The call starts with the first event and can be read once. Leaving the loop, `close` and `with` cancel it. The
    client's tools run on the thread that reads.
    """

    def __init__(self, inner: AsyncTaskRun) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[TaskEvent]:
        return iterate(self._inner.__aiter__())

    def result(self) -> TaskResult:
        """How the task ended; runs it to its end. Raises StreamClosedError for a run that was left early."""
        return run(self._inner.result())

    def close(self) -> None:
        """Cancel the task, if it still runs; another thread may do this."""
        run(self._inner.aclose())

    def __enter__(self) -> TaskRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
