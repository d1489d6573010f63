"""The files of a task off the wire: what each is called, and its bytes or the sha256 of bytes sent before.

Owns the checks that need no disk; finding the bytes of a sha256, and whether the caller may use them, is
`task_files.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from nightschool_proto.v1 import content_pb2

from nightschool_server.config.serving import AgentConfig
from nightschool_server.errors import InvalidRequestError
from nightschool_server.file_names import media_type_fault, media_type_of, name_fault
from nightschool_server.service.blobs import SHA256


@dataclass(frozen=True)
class SentFile:
    """A file as a request brings it, checked."""

    field: str
    """Its path in the request."""
    name: str
    media_type: str
    sha256: str
    data: bytes | None
    """None: the request names bytes that were sent before."""


def files_of(files: Sequence[content_pb2.File], field: str, config: AgentConfig) -> tuple[SentFile, ...]:
    """The files of a request. Hashes the bytes: off the event loop, please. Raises InvalidRequestError."""
    if len(files) > config.max_files:
        _refuse(field, f"has {len(files)} files, but at most {config.max_files} are taken (agent.max_files)")
    found = tuple(_file(file, f"{field}[{index}]", config) for index, file in enumerate(files))
    seen: dict[str, str] = {}
    for file in found:
        if file.name in seen:
            _refuse(f"{file.field}.name", f"is {file.name!r}, as {seen[file.name]}.name is: give each its own name")
        seen[file.name] = file.field
    return found


def _file(file: content_pb2.File, field: str, config: AgentConfig) -> SentFile:
    if fault := name_fault(file.name):
        _refuse(f"{field}.name", fault)
    if file.media_type and (fault := media_type_fault(file.media_type)):
        _refuse(f"{field}.media_type", fault)
    media_type = file.media_type or media_type_of(file.name)
    source = file.WhichOneof("source")
    if source is None:
        _refuse(field, "has neither data nor sha256: send the file's bytes, or the sha256 of an upload")
    if source == "sha256":
        if SHA256.fullmatch(file.sha256) is None:
            _refuse(f"{field}.sha256", f"is {file.sha256[:80]!r}, but must be 64 lower-case hex digits")
        return SentFile(field, file.name, media_type, file.sha256, None)
    check_size(f"{field}.data", len(file.data), config)
    return SentFile(field, file.name, media_type, hashlib.sha256(file.data).hexdigest(), file.data)


def check_size(field: str, size_bytes: int, config: AgentConfig) -> None:
    """Raises InvalidRequestError for a file that is too large."""
    if size_bytes > config.max_file_bytes:
        _refuse(
            field,
            f"has {size_bytes} bytes, but at most {config.max_file_bytes} are taken (agent.max_file_bytes): "
            "send a smaller file",
        )


def _refuse(field: str, fault: str) -> NoReturn:
    raise InvalidRequestError(field, f"{field} {fault}")
