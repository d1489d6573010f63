"""Makes calls: metadata, deadline, retries, and the errors they end with. Written once, for both clients."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import grpc

from nightschool.config import Settings, checked_timeout
from nightschool.methods import Method, Req, Res
from nightschool.retry import RetryBudget, RetryPolicy
from nightschool.status import Origin, error_of
from nightschool.transport import Envelope, Exchange, Transport

T = TypeVar("T")


class Caller:
    """The calls of one client over one transport. As thread-safe as the transport is."""

    def __init__(self, transport: Transport, settings: Settings, retry: RetryPolicy) -> None:
        self.transport = transport
        self.settings = settings
        self._budget = RetryBudget(retry)
        self._metadata = (("authorization", f"Bearer {settings.token}"),) if settings.token else ()

    async def unary(self, method: Method[Req, Res], request: Req, timeout_s: float | None = None) -> Res:
        """One request, one response. Raises the error of `errors.TABLE` that the call ended with."""

        async def attempt(remaining_s: float) -> Res:
            return await self.transport.unary(Envelope(method, remaining_s, self._metadata), request)

        return await self._retrying(method, timeout_s, attempt)

    async def upload(
        self, method: Method[Req, Res], requests: Callable[[], Iterator[Req]], timeout_s: float | None = None
    ) -> Res:
        """A stream of requests, one response; every attempt asks for `requests` anew."""

        async def attempt(remaining_s: float) -> Res:
            return await self.transport.upload(Envelope(method, remaining_s, self._metadata), requests())

        return await self._retrying(method, timeout_s, attempt)

    async def pages(self, method: Method[Req, Res], request: Req) -> AsyncGenerator[Res, None]:
        """Every page of a list; `request` has a page_token, its response a next_page_token."""
        paged: Any = request
        while True:
            page = await self.unary(method, request)
            yield page
            paged.page_token = cast("Any", page).next_page_token
            if not paged.page_token:
                return

    async def stream(
        self, method: Method[Req, Res], request: Req, timeout_s: float | None = None, *, duplex: bool = False
    ) -> Responses[Req, Res]:
        """One request, a stream of responses; with `duplex` more requests may follow. Its first response has arrived.

        What fails before that is tried again, what fails after it is not: the caller has seen half an answer.
        """
        opened = self.transport.duplex if duplex else self.transport.stream

        async def attempt(remaining_s: float) -> Responses[Req, Res]:
            exchange = await opened(Envelope(method, remaining_s, self._metadata), request)
            try:
                first = await exchange.receive()
            except BaseException:
                exchange.cancel()
                raise
            return Responses(exchange, first, self._origin(method, timeout_s))

        return await self._retrying(method, timeout_s, attempt)

    async def _retrying(
        self, method: Method[Req, Res], timeout_s: float | None, attempt: Callable[[float], Awaitable[T]]
    ) -> T:
        origin = self._origin(method, timeout_s)
        deadline = time.monotonic() + origin.timeout_s
        num_retries = 0
        while True:
            try:
                result = await attempt(max(deadline - time.monotonic(), 0.001))
            except grpc.RpcError as rpc:
                error = error_of(rpc, origin)
                delay_s = self._budget.delay_s(error, num_retries, deadline - time.monotonic())
                if delay_s is None:
                    raise error from None
            else:
                self._budget.succeeded()
                return result
            num_retries += 1
            await self.transport.sleep(delay_s)

    def _origin(self, method: Method[Req, Res], timeout_s: float | None) -> Origin:
        allowed = self.settings.timeout_s if timeout_s is None else checked_timeout(timeout_s)
        return Origin(self.settings.address, method.name, allowed)


class Responses(Generic[Req, Res]):
    """The responses of a streaming call, from the first."""

    def __init__(self, exchange: Exchange[Req, Res], first: Res | None, origin: Origin) -> None:
        self._exchange = exchange
        self._first = first
        self._origin = origin
        self._is_started = False

    async def next(self) -> Res | None:
        """The next response, None after the last."""
        if not self._is_started:
            self._is_started = True
            first, self._first = self._first, None
            return first
        try:
            return await self._exchange.receive()
        except grpc.RpcError as rpc:
            raise error_of(rpc, self._origin) from None

    async def send(self, request: Req) -> None:
        """One more request; a call that has ended takes none and says why at the next response."""
        try:
            await self._exchange.send(request)
        except grpc.RpcError as rpc:
            raise error_of(rpc, self._origin) from None

    def cancel(self) -> None:
        """End the call."""
        self._exchange.cancel()
