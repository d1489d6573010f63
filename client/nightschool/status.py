"""From a failed RPC to an exception: reads the `google.rpc.Status` in the trailing metadata.

The server sends its errors as `grpc-status-details-bin`; what does not come from the server (no connection, a
deadline, a message over the limit) has only gRPC's own words, and gets a remedy here. The tables are `errors.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from nightschool.errors import BY_REASON, TABLE, MessageTooLargeError, NightschoolError, Resource

DOMAIN = "nightschool"
DETAILS_KEY = "grpc-status-details-bin"

_TOO_LARGE = re.compile(r"(?P<side>Sent|Received) message larger than max \((?P<size>\d+) vs\. (?P<limit>\d+)\)")


@dataclass(frozen=True)
class Origin:
    """Which call failed, for messages."""

    address: str
    method: str
    timeout_s: float


@dataclass
class Details:
    """What the details of a status say."""

    field: str | None = None
    reason: str | None = None
    retry_after_s: float | None = None
    resource: Resource | None = None


def error_of(rpc: grpc.RpcError, origin: Origin) -> NightschoolError:
    """The exception that a failed RPC becomes."""
    call: Any = rpc
    code: grpc.StatusCode = call.code() or grpc.StatusCode.UNKNOWN
    text = call.details() or ""
    details = details_of(call.trailing_metadata() or ())
    cls = BY_REASON.get(details.reason or "") or TABLE.get(code, TABLE[grpc.StatusCode.UNKNOWN])
    if details.reason is None:
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE.search(text):
            cls = MessageTooLargeError
        text = explain(code, text, origin)
    return cls(
        text or code.name,
        code=code,
        field=details.field,
        reason=details.reason,
        retry_after_s=details.retry_after_s,
        resource=details.resource,
    )


def details_of(metadata: Iterable[tuple[str, str | bytes]]) -> Details:
    """What the trailing metadata tell about the error; nothing where it holds no readable status."""
    details = Details()
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                continue
            for packed in status.details:
                _read(packed, details)
    return details


def _read(packed: Any, details: Details) -> None:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    resource = error_details_pb2.ResourceInfo()
    if packed.Unpack(info):
        # Another domain's reason (a proxy's) must not be read as one of ours.
        if info.domain == DOMAIN:
            details.reason = info.reason
    elif packed.Unpack(bad):
        if bad.field_violations:
            details.field = bad.field_violations[0].field
    elif packed.Unpack(retry):
        details.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    elif packed.Unpack(resource):
        details.resource = Resource(resource.resource_type, resource.resource_name)


def explain(code: grpc.StatusCode, text: str, origin: Origin) -> str:
    """gRPC's own words for an error that the server did not write, with the remedy."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"no answer from {origin.address} ({_short(text)}): is the server up? `nightschool serve` starts one"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{origin.method} took longer than {origin.timeout_s:g} s: raise timeout_s, or ask for fewer tokens"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server at {origin.address} does not know {origin.method}: update it, or check the address"
    if found := _TOO_LARGE.search(text):
        side = "request" if found["side"] == "Sent" else "message"
        return (
            f"the {side} has {found['size']} bytes, at most {found['limit']} are allowed: send less or smaller images"
        )
    return text


def _short(text: str) -> str:
    """The last and most telling part of gRPC's chain of causes."""
    return (text.rsplit("last error: ", 1)[-1] or "no reason given").strip()
