"""Identifiers: `<prefix>_<48 bits of milliseconds><48 random bits>` in hex, so that they sort by age.

Those of one process sort as they were made, within a millisecond too, and when the clock is set back.
"""

from __future__ import annotations

import secrets
import threading
import time

_RANDOM_BITS = 48
_MAX_STEP = 2**32
"""Between two identifiers of one millisecond: random too, so that nobody knows the next one."""


class _Numbers:
    """Ever greater numbers: milliseconds, then random bits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        now = int(time.time() * 1000)
        with self._lock:
            if now > self._last >> _RANDOM_BITS:
                self._last = now << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
            else:
                self._last += 1 + secrets.randbelow(_MAX_STEP)
            return self._last


_numbers = _Numbers()


def new_id(prefix: str) -> str:
    """A fresh identifier, e.g. `resp_019ab3f2c4d1a07be2c91f44`."""
    return f"{prefix}_{_numbers.next():024x}"
