"""The errors of the server, one tree; `status.py` maps each to a gRPC status.

NightschoolError
├── InvalidRequestError        a field of the request breaks its rule
│   └── ContextOverflowError   prompt and answer do not fit the context
├── NotFoundError
│   ├── UnknownAdapterError
│   ├── UnknownCycleError
│   └── UnknownPairError
├── FailedPreconditionError    the request is fine, the state does not allow it
├── AlreadyExistsError         an idempotency key was used for something else
├── AdapterFormatError         a folder that is not a servable adapter
├── ModelFormatError           a model folder that cannot be served
├── ConfigError                config.toml, the environment or a flag is wrong
├── AppError                   the application module or one of its tools is wrong
├── AuthenticationError        no token, or one that is not known
├── PermissionError_           a known token without the needed scope
├── OverloadedError            a bounded queue is full: try again after a while
├── EngineDeadError            the engine stopped stepping
└── EngineAsleepError          the engine has left its device to a trainer
"""

from __future__ import annotations


class NightschoolError(Exception):
    """Base of everything the server raises on purpose. The message may be shown to callers."""


class InvalidRequestError(NightschoolError):
    """A field of the request breaks its rule."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ContextOverflowError(InvalidRequestError):
    """Prompt and answer together do not fit the model's context."""


class NotFoundError(NightschoolError):
    """The named thing does not exist."""

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class UnknownAdapterError(NotFoundError):
    """No adapter of that name, or it is not servable."""

    def __init__(self, name: str, message: str = "") -> None:
        super().__init__("adapter", name, message or f"adapter {name!r} is not known: see `nightschool adapters list`")


class UnknownCycleError(NotFoundError):
    """No cycle of that id."""

    def __init__(self, name: str) -> None:
        super().__init__("cycle", name, f"cycle {name!r} is not known: see `nightschool cycles list`")


class UnknownPairError(NotFoundError):
    """No preference pair of that id."""

    def __init__(self, name: str) -> None:
        super().__init__("pair", name, f"pair {name!r} is not known: see `nightschool pairs list`")


class FailedPreconditionError(NightschoolError):
    """The request is well formed but the present state does not allow it."""


class AlreadyExistsError(NightschoolError):
    """A request_id was used before for a different request."""


class AdapterFormatError(NightschoolError):
    """The folder is not an adapter that this engine can serve; the message names file, value and rule."""


class ModelFormatError(NightschoolError):
    """The model folder cannot be served; the message names what is missing."""


class ConfigError(NightschoolError):
    """A configuration value is wrong; the message names key, value, rule and remedy."""


class AppError(NightschoolError):
    """The application module, or one of its tools, is wrong."""


class AuthenticationError(NightschoolError):
    """No token, or one that is not known."""


class PermissionError_(NightschoolError):
    """The token is known but lacks the scope."""


class OverloadedError(NightschoolError):
    """A bounded queue is full."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(NightschoolError):
    """The engine stopped; requests in flight are lost, a later one may succeed."""


class EngineAsleepError(NightschoolError):
    """The engine has left its device to a trainer, or to an operator; it will be back."""
