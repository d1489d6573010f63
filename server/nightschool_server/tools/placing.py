"""Puts a task's files into its workspace before the first step: live ones and practice's alike.

Each is a copy of its own, which tools may change; where the file system can, the copy shares its blocks with the blob
until then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nightschool_server.chat import File
from nightschool_server.tools.state import ToolState

_COPY_BYTES = 2**30
"""Asked of the kernel at once."""


@dataclass(frozen=True)
class PlacedFile:
    """A file, and where its bytes are."""

    file: File
    source: bytes | Path


def place_files(state: ToolState, files: Sequence[PlacedFile]) -> ToolState:
    """`state` with a workspace that holds the files under their names. Writes the disk: off the event loop, please.

    Raises OSError for a source that cannot be read; then nothing is left.
    """
    if not files:
        return state
    state.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    placed = replace(state, workspace=state.make_workspace())
    assert placed.workspace is not None
    try:
        for one in files:
            target = placed.workspace / one.file.name
            if isinstance(one.source, Path):
                copy_file(one.source, target)
            else:
                target.write_bytes(one.source)
    except BaseException:
        placed.discard()
        raise
    return placed


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes inside the kernel, which shares the blocks where it can."""
    with source.open("rb") as reading, target.open("wb") as writing:
        try:
            while os.copy_file_range(reading.fileno(), writing.fileno(), _COPY_BYTES):
                pass
        except (OSError, AttributeError):
            # Another file system, or another system: from the beginning, through user space.
            reading.seek(0)
            writing.seek(0)
            writing.truncate()
            shutil.copyfileobj(reading, writing)
