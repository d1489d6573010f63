"""The transport of `Client`: gRPC's blocking channel, shared by any number of threads.

Its coroutines block and never suspend; see `transport.py` for why.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic

import grpc

from nightschool.channel import OPTIONS
from nightschool.config import Settings
from nightschool.errors import ToolError
from nightschool.methods import Req, Res
from nightschool.transport import Envelope


class BlockingTransport:
    """A `transport.Transport` over `grpc.Channel`."""

    def __init__(self, settings: Settings) -> None:
        credentials = settings.credentials
        self._channel = (
            grpc.secure_channel(settings.address, credentials, options=OPTIONS)
            if credentials
            else grpc.insecure_channel(settings.address, options=OPTIONS)
        )
        self._closed = threading.Event()

    async def unary(self, envelope: Envelope[Req, Res], request: Req) -> Res:
        method = envelope.method
        call: grpc.UnaryUnaryMultiCallable[Req, Res] = self._channel.unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return call(request, timeout=envelope.timeout_s, metadata=envelope.metadata)

    async def stream(self, envelope: Envelope[Req, Res], request: Req) -> _Responses[Req, Res]:
        method = envelope.method
        call: grpc.UnaryStreamMultiCallable[Req, Res] = self._channel.unary_stream(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return _Responses(call(request, timeout=envelope.timeout_s, metadata=envelope.metadata), _Requests())

    async def duplex(self, envelope: Envelope[Req, Res], request: Req) -> _Responses[Req, Res]:
        method = envelope.method
        call: grpc.StreamStreamMultiCallable[Req, Res] = self._channel.stream_stream(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        requests: _Requests[Req] = _Requests()
        requests.put(request)
        return _Responses(call(iter(requests), timeout=envelope.timeout_s, metadata=envelope.metadata), requests)

    async def upload(self, envelope: Envelope[Req, Res], requests: Iterator[Req]) -> Res:
        method = envelope.method
        call: grpc.StreamUnaryMultiCallable[Req, Res] = self._channel.stream_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return call(requests, timeout=envelope.timeout_s, metadata=envelope.metadata)

    async def sleep(self, seconds: float) -> None:
        # Closing the client ends the wait; the next attempt then fails on the closed channel.
        self._closed.wait(seconds)

    async def run_tool(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        result = function(**arguments)
        if inspect.iscoroutine(result):
            result.close()
            raise ToolError(f"tool {function.__name__!r} is async: run it with AsyncClient")
        return result

    async def close(self) -> None:
        self._closed.set()
        self._channel.close()


class _Requests(Generic[Req]):
    """What is still to be sent; gRPC iterates over it in a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Req | None] = queue.SimpleQueue()

    def put(self, request: Req) -> None:
        self._queue.put(request)

    def end(self) -> None:
        """Let gRPC's thread go."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[Req]:
        while (request := self._queue.get()) is not None:
            yield request


class _Responses(Generic[Req, Res]):
    """A `transport.Exchange` over a blocking call."""

    def __init__(self, call: Any, requests: _Requests[Req]) -> None:
        self._call = call
        self._requests = requests

    async def send(self, request: Req) -> None:
        self._requests.put(request)

    async def receive(self) -> Res | None:
        try:
            response: Res = next(self._call)
        except StopIteration:
            self._requests.end()
            return None
        except BaseException:
            self._requests.end()
            raise
        return response

    def cancel(self) -> None:
        self._requests.end()
        self._call.cancel()
