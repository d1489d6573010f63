"""The gRPC port: one server that answers from the first second, with the real services as soon as they are there.

Health and reflection are served while the model loads; a call that comes before the services is told to come back.
Owns the channel's options, TLS and the refusal of a port in use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from nightschool_proto.v1 import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc

from nightschool_server.config.serving import ServerConfig
from nightschool_server.errors import ConfigError
from nightschool_server.service import status

SERVICES = (
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
CHANNELZ = "grpc.channelz.v1.Channelz"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

MESSAGE_SLACK_BYTES = 16 * 2**20
"""How far over the limit a message may be and still be refused by us, with the rule and the remedy, not by gRPC."""

STARTING_RETRY_S = 2.0

LAST_WORD_S = 0.2
"""For watchers to be told NOT_SERVING before their stream is cut."""


class GrpcPort:
    """The server's one port."""

    def __init__(self, config: ServerConfig, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        """Bind the port. Raises ConfigError where that cannot be."""
        self._services = _LateServices()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config))
        self._server.add_generic_rpc_handlers((self._services,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        names = (*SERVICES, health.SERVICE_NAME, CHANNELZ, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.address = self._bind(config)

    async def start(self) -> None:
        """Answer: health says NOT_SERVING, everything else comes back later."""
        await self._set_health(NOT_SERVING)
        await self._server.start()

    async def open(
        self, agent: agent_pb2_grpc.AgentServiceServicer, admin: admin_pb2_grpc.AdminServiceServicer
    ) -> None:
        """Serve."""
        agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, self._services)  # type: ignore[arg-type]
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._services)  # type: ignore[arg-type]
        await self._set_health(SERVING)

    async def set_serving(self, serving: bool) -> None:
        """What health says from now on; after `drain` began it stays NOT_SERVING."""
        await self._set_health(SERVING if serving else NOT_SERVING)

    async def drain(self, grace_s: float, idle: Callable[[], Awaitable[None]]) -> None:
        """Say so, take no new call, give those in flight `grace_s` to end, then cancel them.

        `idle` returns when nothing is left that is worth waiting for: a client that watches the server's health, or a
        cycle, would hold it up for all of `grace_s`.
        """
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        idling = asyncio.ensure_future(idle())
        await asyncio.wait({stopping, idling}, return_when=asyncio.FIRST_COMPLETED)
        idling.cancel()
        await self._server.stop(LAST_WORD_S)
        await stopping

    async def close(self) -> None:
        """Stop at once; after `drain` there is nothing left to do."""
        await self._server.stop(None)

    async def _set_health(self, value: int) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, value)

    def _bind(self, config: ServerConfig) -> str:
        is_unix = config.host.startswith("unix:")
        wanted = config.host if is_unix else f"{config.host}:{config.port}"
        try:
            if config.tls_cert:
                port = self._server.add_secure_port(wanted, _credentials(config))
            else:
                port = self._server.add_insecure_port(wanted)
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(
                f"cannot listen on {wanted}: the port is in use or the address is not this machine's: choose another "
                "one with --port, or --port 0 for any free one"
            )
        return wanted if is_unix else f"{_reachable(config.host)}:{port}"


class _LateServices(grpc.GenericRpcHandler):
    """Stands in for the servicers until they are there; generated code adds them as it would to a server."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Called by the generated `add_..._to_server`."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
        """Called by the generated `add_..._to_server`; the generic handlers say the same."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, None for one that is not ours."""
        method = handler_call_details.method or ""
        for handler in self._handlers:
            found = handler.service(handler_call_details)
            if found is not None:
                return found
        is_ours = method.lstrip("/").partition("/")[0] in SERVICES
        return grpc.stream_stream_rpc_method_handler(_come_back) if is_ours and not self._handlers else None


async def _come_back(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncGenerator[None, None]:
    await status.abort(context, status.starting_status(STARTING_RETRY_S))
    yield  # what makes this a streaming method, the shape that fits a call of any kind


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    most = config.max_message_bytes + MESSAGE_SLACK_BYTES
    return [
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", most),
        # Silent long decodes are normal: a client may ping as it likes (ENGINES.md, too_many_pings).
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two servers on one port would share its connections silently.
        ("grpc.so_reuseport", 0),
    ]


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    try:
        pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
    except OSError as error:
        raise ConfigError(f"server.tls_cert or server.tls_key cannot be read: {error}") from error
    return grpc.ssl_server_credentials([pair])


def _reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)
