"""Files on their way to a task and back: small ones inside the request, large ones in chunks.

Owns what a caller may pass as a file, the cutting into chunks, and the proof that what arrived is what was sent. Names,
sizes and who may read what are the server's to check.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool.caller import Caller
from nightschool.content import File
from nightschool.errors import InternalError, InvalidRequestError
from nightschool.methods import DOWNLOAD_BLOB, UPLOAD_BLOB

INLINE_BYTES = 2**20
"""Files of a task that are no larger, all of them together, go inside its request."""

CHUNK_BYTES = 2**20

FileLike: TypeAlias = File | str | os.PathLike[str]


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class LocalFile:
    """A file that is to be sent: its bytes, a path, or the sha256 of bytes that the server holds."""

    file: File
    path: Path | None
    size_bytes: int

    def open(self) -> BinaryIO:
        """Its bytes, from the beginning."""
        return io.BytesIO(self.file.data) if self.path is None else self.path.open("rb")


def local_file(source: FileLike, field: str = "file") -> LocalFile:
    """A file of a path, or a `File`. Raises InvalidRequestError for anything else, OSError for a path without one."""
    if isinstance(source, File):
        return LocalFile(source, None, len(source.data))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return LocalFile(File(path.name), path, path.stat().st_size)
    message = f"{field} is a {type(source).__name__}, but must be a path or a nightschool.File"
    raise InvalidRequestError(message, field=field, reason="INVALID_REQUEST")


def local_files(sources: Iterable[FileLike]) -> tuple[LocalFile, ...]:
    """The files of a task. Raises what `local_file` raises."""
    return tuple(local_file(source, f"files[{index}]") for index, source in enumerate(sources))


async def file_protos(caller: Caller, files: Iterable[LocalFile], timeout_s: float | None) -> list[content_pb2.File]:
    """The files as a request names them; what is too large for it is uploaded first."""
    left, protos = INLINE_BYTES, []
    for local in files:
        proto = content_pb2.File(name=local.file.name, media_type=local.file.media_type)
        if local.file.sha256:
            proto.sha256 = local.file.sha256
        elif local.size_bytes <= left:
            left -= local.size_bytes
            with local.open() as source:
                proto.data = source.read()
        else:
            proto.sha256 = (await upload(caller, local, timeout_s)).sha256
        protos.append(proto)
    return protos


async def upload(caller: Caller, local: LocalFile, timeout_s: float | None) -> File:
    """Send a file in chunks. Raises InternalError where the server got other bytes."""
    digest = hashlib.sha256()

    def requests() -> Iterator[agent_pb2.UploadBlobRequest]:
        nonlocal digest
        # Another attempt begins anew.
        digest = hashlib.sha256()
        return _requests(local, digest)

    response = await caller.upload(UPLOAD_BLOB, requests, timeout_s)
    if response.sha256 != digest.hexdigest():
        raise InternalError(f"the server got other bytes than {local.file.name!r} has: upload it again")
    return File(local.file.name, b"", response.sha256, local.file.media_type, response.size_bytes)


def _requests(local: LocalFile, digest: _Digest) -> Iterator[agent_pb2.UploadBlobRequest]:
    yield agent_pb2.UploadBlobRequest(start=agent_pb2.UploadStart(size_bytes=local.size_bytes))
    with local.open() as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            yield agent_pb2.UploadBlobRequest(chunk=chunk)


async def download(caller: Caller, file: File | str, to: Path, timeout_s: float | None) -> Path:
    """Write a file's bytes as `to`, or under its name into that folder; whole or not at all. Returns the path.

    Raises InternalError where what came is not what the sha256 names.
    """
    given = File("", sha256=file) if isinstance(file, str) else file
    path = _path_of(given, to)
    with _whole(path) as target:
        if given.data or not given.sha256:
            target.write(given.data)
        else:
            await _receive(caller, given.sha256, target, timeout_s)
    return path


def _path_of(file: File, to: Path) -> Path:
    # The name comes from a server: a folder in it is not followed.
    return to / (Path(file.name).name or file.sha256) if to.is_dir() else to


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when the block ends well, and is gone otherwise."""
    # `tempfile` would cost every import of this package some milliseconds.
    partial = path.parent / f".download-{os.urandom(8).hex()}"
    try:
        with partial.open("xb") as target:
            yield target
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


async def _receive(caller: Caller, sha256: str, target: BinaryIO, timeout_s: float | None) -> None:
    request = agent_pb2.DownloadBlobRequest(sha256=sha256)
    responses = await caller.stream(DOWNLOAD_BLOB, request, timeout_s)
    digest = hashlib.sha256()
    try:
        while (response := await responses.next()) is not None:
            digest.update(response.chunk)
            target.write(response.chunk)
    finally:
        responses.cancel()
    if digest.hexdigest() != sha256:
        raise InternalError(f"what came has sha256 {digest.hexdigest()}, not {sha256}: download it again")
