"""When a failed call is tried again: the only place that decides it.

gRPC's own retries are switched off (`channel.py`). A call is tried again only when the server may not have seen
it or has asked for it (UNAVAILABLE, CANCELLED by the other end, or RESOURCE_EXHAUSTED with a RetryInfo), only
before the first event of a stream, only within its deadline, and only while the client's budget lasts. Every call
may be: reads change nothing, writes carry a `request_id` that stays the same over all attempts.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import grpc

from nightschool.errors import NightschoolError


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how fast."""

    max_attempts: int = 4
    """Of one call, the first included."""
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    multiplier: float = 2.0
    max_tokens: float = 10.0
    """Of the budget: a failed attempt takes one, a call that succeeds puts `token_ratio` back, and nothing is tried
    again while half or less is left (gRFC A6's retryThrottling)."""
    token_ratio: float = 0.1

    def backoff_s(self, num_retries: int, fraction: float) -> float:
        """Seconds before retry `num_retries` (from 0); `fraction` in [0, 1) is the jitter, over the upper half."""
        bound = min(self.initial_backoff_s * self.multiplier**num_retries, self.max_backoff_s)
        return bound * (0.5 + fraction / 2)


GIVEN_UP_HERE = ("Locally cancelled", "Channel closed")
"""What gRPC says of a call that its own side has ended."""

NO_RETRIES = RetryPolicy(max_attempts=1)


@dataclass
class RetryBudget:
    """What one client may spend on retries, over all its calls. Thread-safe."""

    policy: RetryPolicy
    _tokens: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = self.policy.max_tokens

    def succeeded(self) -> None:
        """A call went through."""
        with self._lock:
            self._tokens = min(self._tokens + self.policy.token_ratio, self.policy.max_tokens)

    def failed(self) -> bool:
        """An attempt failed; whether another may be made."""
        with self._lock:
            self._tokens = max(self._tokens - 1, 0.0)
            return self._tokens > self.policy.max_tokens / 2

    def delay_s(self, error: NightschoolError, num_retries: int, remaining_s: float) -> float | None:
        """Seconds to wait before the next attempt, None to give up.

        A server that says when to come back is believed, never hurried; one that says so beyond the deadline ends
        the call at once.
        """
        if not is_retriable(error) or not self.failed() or num_retries + 1 >= self.policy.max_attempts:
            return None
        delay = max(self.policy.backoff_s(num_retries, random.random()), error.retry_after_s or 0.0)
        return delay if delay < remaining_s else None


def is_retriable(error: NightschoolError) -> bool:
    """Whether another attempt of the same call may end better.

    No method ends as CANCELLED by itself: gRPC ends a call so that reaches a port while it closes, or that this
    process gives up. The latter says so.
    """
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    if error.code is grpc.StatusCode.CANCELLED:
        return not any(words in str(error) for words in GIVEN_UP_HERE)
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None
