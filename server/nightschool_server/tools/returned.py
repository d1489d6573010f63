"""What a call left in its workspace to give back: checked, copied aside, and told to the model.

Runs in the server, after everything that the call started is gone. Nothing is believed: a path must lead to a plain
file inside the workspace without a link, an image must be one that the engine takes, and all of it is bounded. A file
is copied out, because the next call may change it; it lies under the task's root until the task's end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nightschool_server.chat import File
from nightschool_server.file_names import media_type_fault, media_type_of, name_fault
from nightschool_server.image_check import DEFAULT_LIMITS, ImageLimits, check_image
from nightschool_server.tools.content import OUTBOX_PREFIX

RETURNED_FOLDER = "returned"
"""Under the task's root: the files that its tools gave back, by sha256."""

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ReturnLimits:
    """What one call may give back."""

    images: ImageLimits = DEFAULT_LIMITS
    max_files: int = 16
    max_file_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class ReturnedFile:
    """A file that a tool gave back."""

    file: File
    path: Path
    """Where its bytes lie until the task's end."""


@dataclass(frozen=True)
class Contents:
    """The images and files of one call."""

    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by sha256, in their order."""
    files: tuple[ReturnedFile, ...] = ()

    def describe(self, text: str) -> str:
        """What the model reads: the text, and a line of each file."""
        lines = [returned.file.line.rstrip() for returned in self.files]
        if not text and not lines:
            return "1 image" if len(self.images) == 1 else f"{len(self.images)} images"
        return "\n".join([*([text] if text else []), *lines])


def take_returned(
    items: Sequence[Mapping[str, str]], workspace: Path, root: Path, limits: ReturnLimits = ReturnLimits()
) -> Contents:
    """The contents that `content.take_apart` named; the outbox is removed. Reads the disk: off the event loop, please.

    Raises ValueError with what the model is to know of an item that breaks a rule.
    """
    images: dict[str, bytes] = {}
    files: list[ReturnedFile] = []
    try:
        for item in items:
            if item["kind"] == "image":
                data = _image(item["path"], workspace, limits.images)
                images[hashlib.sha256(data).hexdigest()] = data
            else:
                files.append(_file(item, workspace, root, limits))
            _check_numbers(len(images), len(files), limits)
    finally:
        for outbox in {Path(item["path"]).parts[0] for item in items}:
            if outbox.startswith(OUTBOX_PREFIX):
                shutil.rmtree(workspace / outbox, ignore_errors=True)
    return Contents(images, tuple(files))


def _check_numbers(num_images: int, num_files: int, limits: ReturnLimits) -> None:
    if num_images > limits.images.max_images:
        raise ValueError(f"the tool returned more than {limits.images.max_images} images (log.max_images_per_request)")
    if num_files > limits.max_files:
        raise ValueError(f"the tool returned more than {limits.max_files} files (agent.max_files)")


def _image(path: str, workspace: Path, limits: ImageLimits) -> bytes:
    with _open_inside(path, workspace) as file:
        # One byte more than is taken tells that it is too large.
        data = file.read(limits.max_bytes + 1)
    try:
        check_image(data, limits)
    except ValueError as fault:
        shown = "a returned image" if path.startswith(OUTBOX_PREFIX) else f"the returned image {path!r}"
        raise ValueError(f"{shown} {fault}") from None
    return data


def _file(item: Mapping[str, str], workspace: Path, root: Path, limits: ReturnLimits) -> ReturnedFile:
    name, media_type = item["name"], item["media_type"] or media_type_of(item["name"])
    if fault := name_fault(name):
        raise ValueError(f"the name of a returned file {fault}")
    if fault := media_type_fault(media_type):
        raise ValueError(f"the media type of the returned file {name!r} {fault}")
    folder = root / RETURNED_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    with _open_inside(item["path"], workspace) as source:
        size = os.fstat(source.fileno()).st_size
        if size > limits.max_file_bytes:
            raise ValueError(
                f"the returned file {name!r} has {size} bytes, but at most {limits.max_file_bytes} are taken "
                "(agent.max_file_bytes)"
            )
        sha256, path = _copied(source, folder)
    return ReturnedFile(File(name, media_type, path.stat().st_size, sha256), path)


def _copied(source: BinaryIO, folder: Path) -> tuple[str, Path]:
    """The hash of a file and its copy under that name."""
    hashing = hashlib.sha256()
    staged = folder / f".{os.getpid()}-{id(source)}"
    with staged.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            hashing.update(chunk)
            target.write(chunk)
    path = folder / hashing.hexdigest()
    staged.replace(path)
    return hashing.hexdigest(), path


def _open_inside(path: str, workspace: Path) -> BinaryIO:
    """The plain file at `path`, every step of which lies inside the workspace and is no link. Raises ValueError."""
    *folders, name = Path(path).parts or ("",)
    at = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for folder in folders:
            at, above = _open(folder, os.O_RDONLY | os.O_DIRECTORY, at, path), at
            os.close(above)
        # A FIFO would wait for a writer.
        descriptor = _open(name, os.O_RDONLY | os.O_NONBLOCK, at, path)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"the tool returned {path!r}, which is not a plain file")
    return os.fdopen(descriptor, "rb")


def _open(name: str, flags: int, folder: int, path: str) -> int:
    if name in ("", "/", ".", ".."):
        raise ValueError(f"the tool returned {path!r}, which leaves the workspace")
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        why = "a link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise ValueError(f"the tool returned {path!r}, which cannot be read: {why}") from None
