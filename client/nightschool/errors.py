"""What can go wrong, one tree; `TABLE` says which gRPC status becomes which class.

NightschoolError
├── ConfigError                  a setting of this client is wrong: address, home, token file
├── ToolError                    a Python function cannot be offered as a tool
├── StreamClosedError            the reply of a stream that was left before its end
├── InvalidRequestError          INVALID_ARGUMENT, OUT_OF_RANGE: a field breaks its rule
│   ├── ContextOverflowError     prompt and answer do not fit the context
│   └── AdapterFormatError       a folder that is not a servable adapter
├── NotFoundError                NOT_FOUND
├── FailedPreconditionError      FAILED_PRECONDITION: the state does not allow it
├── AlreadyExistsError           ALREADY_EXISTS: a request_id was used for something else
├── UnauthenticatedError         UNAUTHENTICATED: no token, or one that is not known
├── PermissionDeniedError        PERMISSION_DENIED: the token lacks the scope
├── ResourceExhaustedError       RESOURCE_EXHAUSTED
│   ├── OverloadedError          a bounded queue is full: try again after `retry_after_s`
│   └── MessageTooLargeError     more bytes than one message may have
├── UnavailableError             UNAVAILABLE: no server there, or its engine is down
├── DeadlineExceededError        DEADLINE_EXCEEDED: the call took longer than `timeout_s`
├── CancelledError               CANCELLED: someone ended the call
├── AbortedError                 ABORTED: a concurrent change got in between
├── UnimplementedError           UNIMPLEMENTED: the server is older than this client
└── InternalError                INTERNAL, UNKNOWN, DATA_LOSS: a fault of the server

Owns the classes and the tables. Reading a status off the wire is `status.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

__all__ = [
    "AbortedError",
    "AdapterFormatError",
    "AlreadyExistsError",
    "CancelledError",
    "ConfigError",
    "ContextOverflowError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidRequestError",
    "MessageTooLargeError",
    "NightschoolError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "Resource",
    "ResourceExhaustedError",
    "StreamClosedError",
    "ToolError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]


@dataclass(frozen=True)
class Resource:
    """The thing that an error is about."""

    kind: str
    name: str


class NightschoolError(Exception):
    """Base of everything this package raises on purpose. The message is fit to be shown to a person."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        field: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
        resource: Resource | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What, the value, the rule and the remedy, in one sentence."""
        self.code = code
        """The gRPC status; INVALID_ARGUMENT for a mistake that this client found itself."""
        self.field = field
        """Path of the field that breaks its rule, such as `sampling.max_tokens`."""
        self.reason = reason
        """The server's word for the error, such as CONTEXT_OVERFLOW."""
        self.retry_after_s = retry_after_s
        """When trying again may help."""
        self.resource = resource
        """What was not found."""


class ConfigError(NightschoolError):
    """A setting of this client is wrong."""


class ToolError(NightschoolError):
    """A Python function cannot be offered as a tool."""


class StreamClosedError(NightschoolError):
    """The reply of a stream that was left before its end."""


class InvalidRequestError(NightschoolError):
    """A field of the request breaks its rule; `field` names it."""


class ContextOverflowError(InvalidRequestError):
    """Prompt and answer together do not fit the model's context."""


class AdapterFormatError(InvalidRequestError):
    """The folder is not an adapter that the engine can serve."""


class NotFoundError(NightschoolError):
    """The named thing does not exist; `resource` names it."""


class FailedPreconditionError(NightschoolError):
    """The request is well formed but the present state does not allow it."""


class AlreadyExistsError(NightschoolError):
    """A request_id was used before for a different request."""


class UnauthenticatedError(NightschoolError):
    """No token, or one that the server does not know."""


class PermissionDeniedError(NightschoolError):
    """The token is known but lacks the scope."""


class ResourceExhaustedError(NightschoolError):
    """Something bounded is full."""


class OverloadedError(ResourceExhaustedError):
    """The server has too much to do; `retry_after_s` says when to try again."""


class MessageTooLargeError(ResourceExhaustedError):
    """More bytes than one message may have."""


class UnavailableError(NightschoolError):
    """No server answers at the address, or its engine is down."""


class DeadlineExceededError(NightschoolError):
    """The call took longer than it was allowed to."""


class CancelledError(NightschoolError):
    """The call was ended before its answer."""


class AbortedError(NightschoolError):
    """A concurrent change got in between; the call may be tried again."""


class UnimplementedError(NightschoolError):
    """The server does not know the method: it is older than this client, or it is no nightschool server."""


class InternalError(NightschoolError):
    """A fault of the server."""


TABLE: dict[grpc.StatusCode, type[NightschoolError]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: InternalError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
}
"""Every status but OK."""

BY_REASON: dict[str, type[NightschoolError]] = {
    "CONTEXT_OVERFLOW": ContextOverflowError,
    "ADAPTER_FORMAT": AdapterFormatError,
    "OVERLOADED": OverloadedError,
}
"""Reasons that have a class below that of their status."""

CALLER_MISTAKES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
"""Statuses that the caller can mend; the others are the server's, the network's or bad luck."""
