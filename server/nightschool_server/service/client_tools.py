"""The client's end of a running task: tool requests go out on the reply stream, tool results come in.

Owns the matching of the two. One call is open at a time (the loop runs a client's calls in their order), and every call
of a task has an id of its own on the wire, so that an answer that comes too late is never taken for the next call's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from nightschool_proto.v1 import agent_pb2

from nightschool_server import chat
from nightschool_server.errors import InvalidRequestError
from nightschool_server.service import wire
from nightschool_server.service.wire_replies import tool_call_to_proto

Send = Callable[[agent_pb2.RunTaskResponse], None]


class ClientTools:
    """Asks the client to run calls, one after the other."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._num_calls = 0
        self._on_wire: dict[str, str] = {}
        """Ids on the wire of the calls that have begun, by the ids that they have in their step."""
        self._open: tuple[str, asyncio.Future[chat.ToolResult]] | None = None
        self._hung_up = False

    def begin(self, call: chat.ToolCall) -> chat.ToolCall:
        """`call` with its id on the wire; the calls of the next steps get others."""
        self._num_calls += 1
        self._on_wire[call.id] = f"call_{self._num_calls}"
        return self.on_wire(call)

    def on_wire(self, call: chat.ToolCall) -> chat.ToolCall:
        """`call`, which has begun, with its id on the wire."""
        return chat.ToolCall(self._on_wire[call.id], call.name, call.arguments)

    async def ask(self, call: chat.ToolCall) -> chat.ToolResult:
        """What the client gives back for `call`; cancelled at the deadline by the executor."""
        if self._hung_up:
            return _hung_up(call)
        sent = self.on_wire(call)
        answer: asyncio.Future[chat.ToolResult] = asyncio.get_running_loop().create_future()
        self._open = (sent.id, answer)
        try:
            self._send(agent_pb2.RunTaskResponse(tool_request=tool_call_to_proto(sent)))
            return await answer
        finally:
            self._open = None

    async def listen(self, requests: AsyncIterator[agent_pb2.RunTaskRequest]) -> None:
        """Takes results in until the client closes its end.

        Raises InvalidRequestError for a second start, or a result of a call that was never asked for. A result that
        comes after its deadline is dropped: the model has gone on.
        """
        async for request in requests:
            if request.WhichOneof("event") != "tool_result":
                raise InvalidRequestError("start", "start came twice or an event is empty: send tool_result only")
            result = wire.tool_result(request.tool_result, "tool_result")
            if self._open is not None and self._open[0] == result.call_id:
                if not self._open[1].done():
                    self._open[1].set_result(result)
            elif not self._was_asked(result.call_id):
                raise InvalidRequestError(
                    "tool_result.call_id",
                    f"tool_result.call_id is {result.call_id!r}, which no tool_request had: send back its id",
                )
        self._hung_up = True
        if self._open is not None and not self._open[1].done():
            self._open[1].set_result(_hung_up(chat.ToolCall(self._open[0], "", "{}")))

    def _was_asked(self, call_id: str) -> bool:
        number = call_id.removeprefix("call_")
        return number.isdigit() and 1 <= int(number) <= self._num_calls


def _hung_up(call: chat.ToolCall) -> chat.ToolResult:
    return chat.ToolResult(
        call.id, call.name, "error: the client closed its end of the stream: this tool cannot be run", is_error=True
    )
