"""A folder that hostile code has written into: measured, brought into a shape that can be copied, and removed.

Owns the walk that neither depth, nor names, nor permissions, nor numbers can stop. Links are never followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 32
MAX_PATH_CHARS = 1024
"""Under the folder; what lies deeper or has a longer path goes."""
CLOCK_TICK_S = 0.02
"""Times of files are those of the last tick of the kernel's clock."""


@dataclass(frozen=True)
class Size:
    """What a folder holds."""

    num_files: int
    """Folders and links among them."""
    size_bytes: int
    """As the files say it: holes count, since a copy fills them."""

    def __add__(self, other: Size) -> Size:
        return Size(self.num_files + other.num_files, self.size_bytes + other.size_bytes)

    def fault(self, most: Size) -> str | None:
        """Which of the limits in `most` is broken, or None."""
        if self.num_files > most.num_files:
            return f"more than {most.num_files} files"
        if self.size_bytes > most.size_bytes:
            return f"more than {most.size_bytes} bytes of files"
        return None


def measure(folder: Path, stop_at: Size) -> Size:
    """What `folder` holds; counting ends where a limit of `stop_at` is passed."""
    num_files = size_bytes = 0
    for entry, status, _ in _walk(folder):
        num_files += 1
        size_bytes += 0 if entry.is_dir(follow_symlinks=False) else status.st_size
        if num_files > stop_at.num_files or size_bytes > stop_at.size_bytes:
            break
    return Size(num_files, size_bytes)


def tidy(folder: Path, most: Size, since: float) -> list[str]:
    """Remove what no later step could handle, and the names of it: what is too deep, special files, and, where the
    folder is over its limits, whatever changed after `since` (Unix seconds), the largest first.

    What stays can be read, written and copied by the server's user, and is no setuid program.
    """
    removed: list[str] = []
    files: list[tuple[int, str]] = []
    folders: list[tuple[int, str]] = []
    size = Size(0, 0)
    for entry, status, depth in _walk(folder):
        too_far = depth > MAX_DEPTH or len(entry.path) - len(str(folder)) > MAX_PATH_CHARS
        if too_far or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or entry.is_symlink()):
            removed.append(os.path.relpath(entry.path, folder))
            _discard(Path(entry.path))
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        wanted = (status.st_mode & 0o777) | (0o700 if is_folder else 0o600)
        if not entry.is_symlink() and stat.S_IMODE(status.st_mode) != wanted:
            os.chmod(entry.path, wanted)
        size += Size(1, 0 if is_folder else status.st_size)
        if status.st_ctime >= since - CLOCK_TICK_S:  # The kernel sets the time of a change, code cannot.
            (folders if is_folder else files).append((0 if is_folder else status.st_size, entry.path))
    # A folder comes behind what is in it, and stays where something older is.
    for size_bytes, path in (*sorted(files, reverse=True), *sorted(folders, key=lambda found: -len(found[1]))):
        if size.fault(most) is None:
            break
        with contextlib.suppress(OSError):
            os.rmdir(path) if size_bytes == 0 and os.path.isdir(path) else os.unlink(path)
            removed.append(os.path.relpath(path, folder))
            size = Size(size.num_files - 1, size.size_bytes - size_bytes)
    return removed


def remove(folder: Path) -> None:
    """Remove `folder` with all that is in it, however deep. Idempotent."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    _open_up(folder)
    # Every folder is moved to the top before it is emptied, so that no path grows with the depth.
    pending = [folder]
    emptied: list[Path] = []
    while pending:
        place = pending.pop()
        emptied.append(place)
        with os.scandir(place) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    _open_up(Path(entry.path))
                    target = Path(tempfile.mkdtemp(dir=folder))
                    os.rename(entry.path, target)
                    pending.append(target)
                else:
                    os.unlink(entry.path)
    for place in reversed(emptied):
        place.rmdir()


def _discard(path: Path) -> None:
    """Remove one entry, whatever it is, by a short name: its own may be too long for what is under it."""
    with contextlib.suppress(FileNotFoundError):
        remove(path)


def _walk(folder: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result, int]]:
    """Every entry with its status and depth, parents first; what is removed meanwhile is not entered."""
    pending = [(folder, 1)]
    while pending:
        place, depth = pending.pop()
        try:
            _open_up(place)
            with os.scandir(place) as entries:
                found = list(entries)
        except OSError:
            continue
        for entry in found:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            yield entry, status, depth
            if entry.is_dir(follow_symlinks=False) and depth <= MAX_DEPTH:
                pending.append((Path(entry.path), depth + 1))


def _open_up(folder: Path) -> None:
    """Give the owner every right on a folder, which code may have taken."""
    mode = stat.S_IMODE(folder.lstat().st_mode)
    if mode & 0o700 != 0o700:
        folder.chmod(mode & 0o777 | 0o700)
