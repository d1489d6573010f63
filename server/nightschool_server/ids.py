"""Identifiers: `<prefix>_<48 bits of milliseconds><48 random bits>` in hex, so that they sort by age."""

from __future__ import annotations

import secrets
import time


def new_id(prefix: str) -> str:
    """A fresh identifier, e.g. `resp_019ab3f2c4d1a07be2c91f44`."""
    return f"{prefix}_{int(time.time() * 1000):012x}{secrets.token_hex(6)}"
