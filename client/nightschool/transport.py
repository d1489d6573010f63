"""The seam between what a call means and how it travels.

`Caller` and everything above it are written once, as coroutines over this protocol. Two transports implement it:
`async_transport.py` awaits grpc.aio; `blocking_transport.py` blocks inside its coroutines, which therefore never
suspend, so that `blocking.py` can run them to their end without an event loop. Nothing above the transport may await
anything but the transport.

Transports raise `grpc.RpcError`; `caller.py` turns it into this package's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from nightschool.methods import Method, Req, Req_contra, Res, Res_co

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Envelope(Generic[Req, Res_co]):
    """One attempt of a call, without its request."""

    method: Method[Req, Res_co]
    timeout_s: float
    metadata: Metadata


class Exchange(Protocol[Req_contra, Res_co]):
    """A call in progress that answers with a stream."""

    async def send(self, request: Req_contra) -> None:
        """Write one more request; only for a call that streams both ways."""
        ...

    async def receive(self) -> Res_co | None:
        """The next response, None after the last one."""
        ...

    def cancel(self) -> None:
        """End the call at the server too; nothing happens to one that has ended."""
        ...


class Transport(Protocol):
    """One channel to one server."""

    async def unary(self, envelope: Envelope[Req, Res], request: Req) -> Res:
        """One request, one response."""
        ...

    async def stream(self, envelope: Envelope[Req, Res], request: Req) -> Exchange[Req, Res]:
        """One request, a stream of responses."""
        ...

    async def duplex(self, envelope: Envelope[Req, Res], request: Req) -> Exchange[Req, Res]:
        """Streams both ways, `request` first."""
        ...

    async def upload(self, envelope: Envelope[Req, Res], requests: Iterator[Req]) -> Res:
        """A stream of requests, taken as they can be sent; one response."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait between two attempts."""
        ...

    async def run_tool(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Call a tool of the application; raises what it raises."""
        ...

    async def close(self) -> None:
        """End all calls and the channel."""
        ...
