"""The transport of `AsyncClient`: grpc.aio on the caller's event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Generic, cast

import grpc.aio

from nightschool.channel import OPTIONS
from nightschool.config import Settings
from nightschool.methods import Req, Res
from nightschool.transport import Envelope


class AsyncTransport:
    """A `transport.Transport` over `grpc.aio.Channel`, which is opened by the first call on that call's loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: grpc.aio.Channel | None = None

    def _channel(self) -> grpc.aio.Channel:
        if self._opened is None:
            address, credentials = self._settings.address, self._settings.credentials
            self._opened = (
                grpc.aio.secure_channel(address, credentials, options=OPTIONS)
                if credentials
                else grpc.aio.insecure_channel(address, options=OPTIONS)
            )
        return self._opened

    async def unary(self, envelope: Envelope[Req, Res], request: Req) -> Res:
        method = envelope.method
        call: grpc.aio.UnaryUnaryMultiCallable[Req, Res] = self._channel().unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return await call(request, timeout=envelope.timeout_s, metadata=envelope.metadata)

    async def stream(self, envelope: Envelope[Req, Res], request: Req) -> _Responses[Req, Res]:
        method = envelope.method
        call: grpc.aio.UnaryStreamMultiCallable[Req, Res] = self._channel().unary_stream(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return _Responses(call(request, timeout=envelope.timeout_s, metadata=envelope.metadata))

    async def duplex(self, envelope: Envelope[Req, Res], request: Req) -> _Responses[Req, Res]:
        method = envelope.method
        call: grpc.aio.StreamStreamMultiCallable[Req, Res] = self._channel().stream_stream(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        responses: _Responses[Req, Res] = _Responses(call(timeout=envelope.timeout_s, metadata=envelope.metadata))
        await responses.send(request)
        return responses

    async def upload(self, envelope: Envelope[Req, Res], requests: Iterator[Req]) -> Res:
        method = envelope.method
        call: grpc.aio.StreamUnaryMultiCallable[Req, Res] = self._channel().stream_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return await call(_aside(requests), timeout=envelope.timeout_s, metadata=envelope.metadata)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def run_tool(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        # A plain function may take its time: the loop must not wait for it.
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        result = await asyncio.to_thread(function, **arguments)
        return await result if inspect.isawaitable(result) else result

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


async def _aside(requests: Iterator[Req]) -> AsyncIterator[Req]:
    """The requests, each made in a thread: reading a file must not hold up the loop."""
    while (request := await asyncio.to_thread(next, requests, None)) is not None:
        yield request


class _Responses(Generic[Req, Res]):
    """A `transport.Exchange` over a call of grpc.aio."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, request: Req) -> None:
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:
            # The call is over; `receive` says how it ended.
            return

    async def receive(self) -> Res | None:
        response = await self._call.read()
        return None if response is grpc.aio.EOF else cast("Res", response)

    def cancel(self) -> None:
        self._call.cancel()
