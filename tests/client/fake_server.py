"""A gRPC server on port 0 that speaks `nightschool.v1` from a script: the SDK's counterpart in these tests.

Every call is recorded. A test may put steps into `script[method]`: each call takes the next one, a function of
(request, context) that answers or aborts; without one it gets a plausible answer. Runs in threads of its own, so that
blocking and async clients meet the same server.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2

TOKEN = "secret"
WAIT_S = 60.0
"""How long a test waits for an event before it fails."""

Step = Callable[[Any, grpc.ServicerContext], Any]


@dataclass(frozen=True)
class Call:
    """What arrived."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    remaining_s: float
    ended: threading.Event
    """Set when the call is over, whoever ended it."""


@dataclass
class FakeServer:
    """The server; `with FakeServer() as server` starts and stops it."""

    calls: list[Call] = field(default_factory=list)
    script: defaultdict[str, deque[Step]] = field(default_factory=lambda: defaultdict(deque))
    tool_results: list[content_pb2.ToolResult] = field(default_factory=list)
    """What clients sent back in RunTask."""
    defaults: Mapping[str, Step] = field(default_factory=dict)
    """What a method answers without a script."""
    port: int = 0

    def __enter__(self) -> FakeServer:
        options = [("grpc.max_receive_message_length", 1 << 27)]
        self._server = grpc.server(ThreadPoolExecutor(16), options=options)
        self._server.add_generic_rpc_handlers((_Handler(self),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(WAIT_S)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def calls_of(self, method: str) -> list[Call]:
        """The calls of one method, in order."""
        return [call for call in self.calls if call.method == method]

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        """Record a call and take the next step of the script."""
        ended = threading.Event()
        if not context.add_callback(ended.set):
            ended.set()
        metadata = dict(context.invocation_metadata())
        self.calls.append(Call(method, request, metadata, context.time_remaining(), ended))
        if metadata.get("authorization") != f"Bearer {TOKEN}":
            abort(context, grpc.StatusCode.UNAUTHENTICATED, "no token: make one with `nightschool token create`")
        steps = self.script[method]
        step = steps.popleft() if steps else self.defaults[method]
        return step(request, context)


class _Handler(grpc.GenericRpcHandler):
    """Every method of both services."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        services = (agent_pb2.DESCRIPTOR.services_by_name, admin_pb2.DESCRIPTOR.services_by_name)
        self._methods = {
            f"/{service.full_name}/{method.name}": method
            for by_name in services
            for service in by_name.values()
            for method in service.methods
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return None
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

        def behave(argument: Any, context: grpc.ServicerContext) -> Any:
            return self._server.answer(method.name, argument, context)

        def behave_and_yield(argument: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._server.answer(method.name, argument, context)

        make, function = {
            (False, False): (grpc.unary_unary_rpc_method_handler, behave),
            (False, True): (grpc.unary_stream_rpc_method_handler, behave_and_yield),
            (True, True): (grpc.stream_stream_rpc_method_handler, behave_and_yield),
        }[method.client_streaming, method.server_streaming]
        return make(function, request.FromString, response.SerializeToString)


def abort(
    context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: ProtoMessage, reason: str = ""
) -> None:
    """End a call as the real server does: a `google.rpc.Status` with an ErrorInfo and further details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason or code.name, domain="nightschool")
    for detail in (info, *details):
        status.details.add().Pack(detail)
    context.abort_with_status(rpc_status.to_status(status))


def failing(code: grpc.StatusCode, message: str = "scripted", *details: ProtoMessage, reason: str = "") -> Step:
    """A step that ends the call with an error; usable for streams too."""

    def step(request: Any, context: grpc.ServicerContext) -> Any:
        abort(context, code, message, *details, reason=reason)

    return step


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)
