"""Files that survive a crash: written aside, flushed to the disk, then renamed into place.

After `write_file` returns, the file is whole under its name whatever happens; before, it is not there at all. What a
crash leaves of unfinished writes begins with `TEMPORARY_PREFIX`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` as `path`, replacing what is there."""
    staged = stage_file(path.parent, data, mode)
    staged.replace(path)
    sync_folder(path.parent)


def stage_file(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    """Write `data` to a fresh temporary file in `folder` and flush it; the caller renames it."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def sync_file(path: Path) -> None:
    """Flush a file that someone else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder: a rename survives a power loss only after this."""
    sync_file(folder)
