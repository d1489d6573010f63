"""What every call passes on its way in and out: who asks, may they, how long, how many, and what an error becomes.

One interceptor wraps every method but health and reflection: it authenticates the bearer token, checks the
scope, bounds the deadline and the number of calls in flight, counts, and turns exceptions into statuses. The
servicers below it raise the server's errors and never touch gRPC's. A streamed reply is written from inside the
guard, so that a cancelled call closes its generator, and with it the engine's work, at once.

Owns the policy of a call. Tokens are `auth.py`'s, the table of statuses is `status.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2
from nightschool_proto.v1 import content_pb2

from nightschool_server import ids
from nightschool_server.auth import Caller
from nightschool_server.counters import Counters, Kind, Slot
from nightschool_server.errors import (
    AuthenticationError,
    EngineAsleepError,
    InvalidRequestError,
    NightschoolError,
    PermissionError_,
)
from nightschool_server.service import status

log = logging.getLogger(__name__)

OPEN_SERVICES = frozenset({"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"})
AGENT_SERVICE = "nightschool.v1.AgentService"
ENDLESS = frozenset({"/nightschool.v1.AdminService/WatchCycle", "/nightschool.v1.AdminService/SleepEngine"})
"""Methods that may run as long as their caller likes."""

BOUNDED_BY_THEMSELVES = frozenset(f"/{AGENT_SERVICE}/{name}" for name in ("RunTask", "UploadBlob", "DownloadBlob"))
"""Methods whose own limits (agent.max_task_s, agent.max_file_bytes) are meant to end them first."""

MODEL_CALLS = frozenset(f"/{AGENT_SERVICE}/{name}" for name in ("Generate", "StreamGenerate", "Score", "RunTask"))
"""Methods that need the engine."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Call:
    """The call that the current task serves."""

    id: str
    method: str
    caller: Caller


CURRENT_CALL: ContextVar[Call] = ContextVar("current_call")
"""Set for the whole of a call; the log's formatter and the servicers read it."""


def current_caller() -> Caller:
    """Who made the call that the current task serves."""
    return CURRENT_CALL.get().caller


class Authenticator(Protocol):
    """What the interceptor asks of `auth.Tokens`."""

    def authenticate(self, token: str) -> Caller:
        """The caller of a token. Raises AuthenticationError."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long calls may take and how many may run."""

    default_deadline_s: float
    max_deadline_s: float
    max_in_flight: int
    """Of each kind of call."""
    max_message_bytes: int


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Guards every method of the server but the open ones."""

    def __init__(self, tokens: Authenticator, limits: Limits, counters: Counters | None = None) -> None:
        self._tokens = tokens
        self._limits = limits
        self.counters = counters or Counters()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler in the guard."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or service_of(method) in OPEN_SERVICES:
            return handler
        return _wrapped(handler, lambda request, context: self._guard(method, request, context))

    @asynccontextmanager
    async def _guard(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        """Everything around one call; its errors leave as statuses."""
        call_id, started = ids.new_id("call"), time.monotonic()
        failure: status_pb2.Status | None = None
        try:
            caller = self._authenticate(method, request, context)
            token = CURRENT_CALL.set(Call(call_id, method, caller))
            try:
                with self._admitted(method, request):
                    async with self._deadline(method, context):
                        yield
            finally:
                CURRENT_CALL.reset(token)
        except NightschoolError as error:
            failure = status.status_of(error)
        except _DeadlineError as error:
            failure = status.deadline_status(str(error))
        except grpc.aio.AbortError:
            # Whoever ended the call so has sent its status.
            raise
        except (asyncio.CancelledError, GeneratorExit):
            log.info("event=call_cancelled call=%s method=%s", call_id, method)
            raise
        except Exception:
            log.exception("event=internal_error call=%s method=%s", call_id, method)
            failure = status.internal_status(call_id)
        self._count(method, failure)
        _log_end(call_id, method, failure, time.monotonic() - started)
        if failure is not None:
            await status.abort(context, failure)

    def _authenticate(self, method: str, request: Any, context: Context) -> Caller:
        """The caller, known and with the scope that this method and priority need."""
        token = bearer_token(context)
        if not token:
            raise AuthenticationError(
                "no token: send the metadata `authorization: Bearer TOKEN`; make one with "
                "`python -m nightschool_server token create NAME --scope user`"
            )
        caller = self._tokens.authenticate(token)
        if service_of(method) != AGENT_SERVICE and caller.scope != "admin":
            raise PermissionError_(f"{method} needs a token of scope admin; {caller.name!r} has scope {caller.scope}")
        if is_practice(request) and caller.scope != "admin":
            raise PermissionError_(
                f"priority PRACTICE needs a token of scope admin; {caller.name!r} has scope {caller.scope}: "
                "leave priority out"
            )
        return caller

    def _admitted(self, method: str, request: Any) -> Slot:
        """A place among the calls of its kind. Raises OverloadedError, and InvalidRequestError for a huge message."""
        size, limit = request.ByteSize() if hasattr(request, "ByteSize") else 0, self._limits.max_message_bytes
        if size > limit:
            raise InvalidRequestError(
                "request",
                f"the request has {size} bytes, but at most {limit} are taken (server.max_message_bytes): "
                "send smaller images, or an image sent before by its sha256",
            )
        if self.counters.is_lent and method in MODEL_CALLS:
            raise EngineAsleepError("the engine's device trains an adapter: try again later")
        return Slot(self.counters, kind_of(method, request), self._limits.max_in_flight)

    @asynccontextmanager
    async def _deadline(self, method: str, context: Context) -> AsyncIterator[None]:
        """Bounds the call where the caller set no deadline or one beyond the cap."""
        if method in ENDLESS:
            yield
            return
        remaining, limits = context.time_remaining(), self._limits
        default = limits.max_deadline_s if method in BOUNDED_BY_THEMSELVES else limits.default_deadline_s
        allowed = default if remaining is None else min(remaining, limits.max_deadline_s)
        timeout = asyncio.timeout(allowed)
        try:
            async with timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            given = "no deadline was given and" if remaining is None else f"the call asked for {remaining:.0f} s but"
            raise _DeadlineError(
                f"{given} the server ends calls after {allowed:g} s "
                "(server.default_deadline_s, server.max_deadline_s): ask for fewer tokens or raise the limit"
            ) from None

    def _count(self, method: str, failure: status_pb2.Status | None) -> None:
        if service_of(method) != AGENT_SERVICE:
            return
        if failure is None:
            self.counters.num_served += 1
        elif status.code_of(failure) in status.SERVER_FAULTS:
            self.counters.num_failed += 1


class _DeadlineError(Exception):
    """The server's own deadline passed."""


def kind_of(method: str, request: Any) -> Kind:
    """What a call counts as."""
    if method in ENDLESS:
        return "watch"
    if service_of(method) != AGENT_SERVICE:
        return "admin"
    return "practice" if is_practice(request) else "live"


def service_of(method: str) -> str:
    """`nightschool.v1.AgentService` of `/nightschool.v1.AgentService/Generate`."""
    return method.rpartition("/")[0].lstrip("/")


def bearer_token(context: Context) -> str:
    """The token in the call's metadata, empty where there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""


def is_practice(request: Any) -> bool:
    """Whether a request asks for the learner's priority."""
    return getattr(request, "priority", None) == content_pb2.PRACTICE


def _log_end(call_id: str, method: str, failure: status_pb2.Status | None, duration_s: float) -> None:
    if failure is None:
        log.debug("event=call_ok call=%s method=%s duration_s=%.3f", call_id, method, duration_s)
        return
    log.info(
        "event=call_failed call=%s method=%s code=%s reason=%s duration_s=%.3f",
        call_id,
        method,
        status.code_of(failure).name,
        status.reason_of(failure),
        duration_s,
    )


def _wrapped(handler: Any, guard: Callable[[Any, Context], AbstractAsyncContextManager[None]]) -> Any:
    """The handler with its behaviour inside the guard, for each of the four shapes of a method."""

    async def unary(request: Any, context: Context) -> Any:
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        async with guard(request, context):
            return await behaviour(request, context)

    async def stream(request: Any, context: Context) -> None:
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        async with guard(request, context), aclosing(behaviour(request, context)) as replies:
            async for reply in replies:
                await context.write(reply)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behaviour = stream if handler.response_streaming else unary
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
