"""Copies of a workspace: every file shares its blocks with the original where the file system can, else it is copied.

Owns what a copy keeps: content, modes, times and extended attributes, and links, of which absolute ones into the
original lead into the copy. A hard link becomes a file of its own. Left out is what is neither file, folder nor link:
reading a FIFO would wait for ever, and a device is not the task's own.

A reflink (FICLONE: Btrfs, XFS, bcachefs) costs the same for every size of file. An overlay mount would cost nothing
until a write, but needs rights that a server should not have, and leaves mounts behind a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

FICLONE = 0x40049409
"""Of linux/fs.h: make a file share all blocks of another one, each its own from the first write on."""


_OF_THE_TREE = frozenset({errno.ENAMETOOLONG, errno.EACCES, errno.EPERM})


class UncopyableError(Exception):
    """A workspace that cannot be copied because of what a tool has made of it, not because of the disk."""


def copy_tree(source: Path, target: Path) -> None:
    """Copy what is in the folder `source` into the empty folder `target`.

    Raises UncopyableError, or OSError where the disk is full or broken, and leaves a part.
    """
    try:
        _copy_tree(source, target)
    except OSError as error:
        if error.errno in _OF_THE_TREE:
            raise UncopyableError(f"a tool has left what cannot be copied: {error.strerror}") from error
        raise


def _copy_tree(source: Path, target: Path) -> None:
    copier = _Copier(source, target)
    folders = [(str(source), str(target))]
    for original, copy in folders:  # It grows while it is walked: a tool may nest deeper than the stack goes.
        with os.scandir(original) as entries:
            folders += [(entry.path, f"{copy}/{entry.name}") for entry in entries if copier.copy(entry, copy)]
    # Last and from within: writing into a folder changes its times, and its mode may forbid it.
    for original, copy in reversed(folders):
        shutil.copystat(original, copy)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, also where a tool has taken away the right to. Idempotent; what cannot
    go stays."""
    if folder.is_symlink() or not folder.is_dir():
        return
    folders = [str(folder)]
    for path in folders:
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        os.unlink(entry.path)
    for path in reversed(folders):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    if folder.is_dir():
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)  # By descriptors: they reach where a path is too long.


class _Copier:
    """Copies entries of one tree."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source = source
        self._target = target
        self._shares_blocks = True
        """Until the file system says that it cannot."""

    def copy(self, entry: os.DirEntry[str], folder: str) -> bool:
        """Put a copy of the entry into `folder`. Gives whether it is a folder, whose entries are still to be copied."""
        copy = f"{folder}/{entry.name}"
        if entry.is_symlink():
            os.symlink(self._leading(os.readlink(entry.path)), copy)
        elif entry.is_dir():
            os.mkdir(copy, 0o700)
            return True
        elif entry.is_file():
            self._copy_file(entry.path, copy)
        else:
            return False
        shutil.copystat(entry.path, copy, follow_symlinks=False)
        return False

    def _leading(self, link: str) -> str:
        """Where a link of the original leads in the copy."""
        target = Path(link)
        if target.is_absolute() and target.is_relative_to(self._source):
            return str(self._target / target.relative_to(self._source))
        return link

    def _copy_file(self, original: str, copy: str) -> None:
        if self._shares_blocks:
            self._shares_blocks = share_blocks(original, copy)
        if not self._shares_blocks:
            shutil.copyfile(original, copy)


def share_blocks(original: str, copy: str) -> bool:
    """Make the file `copy` a reflink of `original`; False where that cannot be, and an empty file is left."""
    with open(original, "rb") as source, open(copy, "wb") as target:
        try:
            fcntl.ioctl(target, FICLONE, source.fileno())
        except OSError:  # Not of this file system, or of two of them: a copy says what else may be wrong.
            return False
    return True
