"""The one table from the server's exceptions to gRPC statuses; the SDK holds its inverse.

Every error leaves the server as a `google.rpc.Status` in the trailing metadata (`grpc-status-details-bin`):
an `ErrorInfo` (domain "nightschool", a reason from `REASONS`) always, a `BadRequest` that names the field
for a request that breaks a rule, a `ResourceInfo` for something that does not exist, a `RetryInfo` where
trying again may help. Owns the mapping; who catches what is `interceptors.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from nightschool_server import errors

DOMAIN = "nightschool"

MAX_MESSAGE_BYTES = 1000
"""A message travels three times in the trailing metadata, whose limit is 8 KiB in every gRPC client."""

ENGINE_RETRY_S = 5.0
"""How long a caller should wait for an engine that died: a restart and the loading of a small model."""

ASLEEP_RETRY_S = 15.0
"""How long a caller should wait for an engine that sleeps: training takes minutes, nobody knows how many."""


@dataclass(frozen=True)
class Row:
    """What an exception class becomes."""

    code: grpc.StatusCode
    reason: str


TABLE: dict[type[errors.NightschoolError], Row] = {
    errors.InvalidRequestError: Row(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.ContextOverflowError: Row(grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW"),
    errors.NotFoundError: Row(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.UnknownAdapterError: Row(grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER"),
    errors.UnknownCycleError: Row(grpc.StatusCode.NOT_FOUND, "UNKNOWN_CYCLE"),
    errors.UnknownPairError: Row(grpc.StatusCode.NOT_FOUND, "UNKNOWN_PAIR"),
    errors.FailedPreconditionError: Row(grpc.StatusCode.FAILED_PRECONDITION, "FAILED_PRECONDITION"),
    errors.AlreadyExistsError: Row(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.AdapterFormatError: Row(grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_FORMAT"),
    errors.ModelFormatError: Row(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FORMAT"),
    errors.ConfigError: Row(grpc.StatusCode.INVALID_ARGUMENT, "CONFIG"),
    errors.AppError: Row(grpc.StatusCode.FAILED_PRECONDITION, "APP"),
    errors.AuthenticationError: Row(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionError_: Row(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.OverloadedError: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.EngineDeadError: Row(grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD"),
    errors.EngineAsleepError: Row(grpc.StatusCode.UNAVAILABLE, "ENGINE_ASLEEP"),
}
"""A class that is not here takes the row of its nearest base; `NightschoolError` itself is INTERNAL."""

STARTING = Row(grpc.StatusCode.UNAVAILABLE, "STARTING")
INTERNAL = Row(grpc.StatusCode.INTERNAL, "INTERNAL")
DEADLINE = Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")

REASONS = frozenset(m.reason for m in (*TABLE.values(), STARTING, INTERNAL, DEADLINE))

SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that count as failed requests; the others are the caller's mistake."""


def row_of(error: errors.NightschoolError) -> Row:
    """The row of the nearest class of `error` in the table."""
    for cls in type(error).__mro__:
        found = TABLE.get(cls)
        if found is not None:
            return found
    return INTERNAL


def status_of(error: errors.NightschoolError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error that was raised on purpose."""
    row = row_of(error)
    message = _clip(str(error))
    details: list[ProtoMessage] = []
    if isinstance(error, errors.InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.NotFoundError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.kind, resource_name=_clip(error.name, 200), description=message
            )
        )
    if isinstance(error, errors.OverloadedError):
        details.append(_retry_after(error.retry_after_s))
    if isinstance(error, errors.EngineDeadError):
        details.append(_retry_after(ENGINE_RETRY_S))
    if isinstance(error, errors.EngineAsleepError):
        details.append(_retry_after(ASLEEP_RETRY_S))
    return _status(row, message, *details)


def internal_status(error_id: str) -> status_pb2.Status:
    """What a caller sees of a bug: nothing but where to look."""
    return _status(INTERNAL, f"internal error, see the server's log, id {error_id}")


def deadline_status(message: str) -> status_pb2.Status:
    """The server's own deadline passed; the caller's is gRPC's to report."""
    return _status(DEADLINE, _clip(message))


def starting_status(retry_after_s: float) -> status_pb2.Status:
    """The server is there, its model is not yet."""
    return _status(STARTING, "the server is loading its model: try again shortly", _retry_after(retry_after_s))


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of a status."""
    return _CODES[status.code]


def reason_of(status: status_pb2.Status) -> str:
    """The reason in the status's ErrorInfo."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return str(info.reason)
    return ""


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> None:
    """End the call with `status`. Raises: gRPC ends a call by an exception of its own."""
    await context.abort_with_status(rpc_status.to_status(status))


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _status(row: Row, message: str, *details: ProtoMessage) -> status_pb2.Status:
    status = status_pb2.Status(code=row.code.value[0], message=message)
    for detail in (error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN), *details):
        status.details.add().Pack(detail)
    return status


def _retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _clip(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """`text` in at most `limit` bytes of UTF-8, a clipped one marked so."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 4].decode("utf-8", "ignore") + " ..."
