"""The client's end of a running task: tool requests go out on the reply stream, tool results come in.

Owns the matching of the two. One call is open at a time (the loop runs a client's calls in their order), and every call
of a task has an id of its own on the wire, so that an answer that comes too late is never taken for the next call's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import chat
from nightschool_server.agent.executors import ClientAnswer
from nightschool_server.errors import InvalidRequestError
from nightschool_server.image_check import ImageLimits
from nightschool_server.service import wire
from nightschool_server.service.wire_images import ImageParts
from nightschool_server.service.wire_replies import tool_call_to_proto

Send = Callable[[agent_pb2.RunTaskResponse], None]
FindImages = Callable[[ImageParts], Awaitable[Mapping[str, bytes]]]


class ClientTools:
    """Asks the client to run calls, one after the other."""

    def __init__(self, send: Send, find_images: FindImages, limits: ImageLimits) -> None:
        """`find_images` gives the bytes of images, `limits` what one result may bring."""
        self._send = send
        self._find_images = find_images
        self._limits = limits
        self._num_calls = 0
        self._on_wire: dict[str, str] = {}
        """Ids on the wire of the calls that have begun, by the ids that they have in their step."""
        self._open: tuple[str, asyncio.Future[ClientAnswer]] | None = None
        self._hung_up = False

    def begin(self, call: chat.ToolCall) -> chat.ToolCall:
        """`call` with its id on the wire; the calls of the next steps get others."""
        self._num_calls += 1
        self._on_wire[call.id] = f"call_{self._num_calls}"
        return self.on_wire(call)

    def on_wire(self, call: chat.ToolCall) -> chat.ToolCall:
        """`call`, which has begun, with its id on the wire."""
        return chat.ToolCall(self._on_wire[call.id], call.name, call.arguments)

    async def ask(self, call: chat.ToolCall) -> ClientAnswer:
        """What the client gives back for `call`; cancelled at the deadline by the executor."""
        if self._hung_up:
            return _hung_up(call)
        sent = self.on_wire(call)
        answer: asyncio.Future[ClientAnswer] = asyncio.get_running_loop().create_future()
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
            answer = await self._read(request.tool_result)
            result = answer.result
            if self._open is not None and self._open[0] == result.call_id:
                if not self._open[1].done():
                    self._open[1].set_result(answer)
            elif not self._was_asked(result.call_id):
                raise InvalidRequestError(
                    "tool_result.call_id",
                    f"tool_result.call_id is {result.call_id!r}, which no tool_request had: send back its id",
                )
        self._hung_up = True
        if self._open is not None and not self._open[1].done():
            self._open[1].set_result(_hung_up(chat.ToolCall(self._open[0], "", "{}")))

    async def _read(self, sent: content_pb2.ToolResult) -> ClientAnswer:
        """A result as it came, with its images. Raises InvalidRequestError for one that is none."""
        images = ImageParts(self._limits)
        if any(image.data for image in sent.images):
            # Hashing takes its time.
            result = await asyncio.to_thread(wire.tool_result, sent, "tool_result", images)
        else:
            result = wire.tool_result(sent, "tool_result", images)
        return ClientAnswer(result, await self._find_images(images))

    def _was_asked(self, call_id: str) -> bool:
        number = call_id.removeprefix("call_")
        return number.isdigit() and 1 <= int(number) <= self._num_calls


def _hung_up(call: chat.ToolCall) -> ClientAnswer:
    content = "error: the client closed its end of the stream: this tool cannot be run"
    return ClientAnswer(chat.ToolResult(call.id, call.name, content, is_error=True))
