"""What is installed."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Of this distribution."""
    return metadata.version("nightschool")
