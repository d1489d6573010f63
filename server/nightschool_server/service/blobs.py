"""UploadBlob and DownloadBlob: bytes that do not fit a message, in chunks, of which one at a time is in memory.

Owns the checks of both; where the bytes lie and who may read them is `store/held.py`'s.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

from nightschool_proto.v1 import agent_pb2

from nightschool_server.auth import Caller
from nightschool_server.config.serving import AgentConfig
from nightschool_server.errors import FailedPreconditionError, InvalidRequestError, NotFoundError
from nightschool_server.file_names import DEFAULT_MEDIA_TYPE
from nightschool_server.store import held
from nightschool_server.store.held import IncomingBlob
from nightschool_server.store.store import Store
from nightschool_server.uninterrupted import obtained, uninterrupted

MAX_CHUNK_BYTES = 4 * 2**20
DOWNLOAD_CHUNK_BYTES = 2**20

SHA256 = re.compile(r"[0-9a-f]{64}")

Requests = AsyncIterator[agent_pb2.UploadBlobRequest]


async def upload(store: Store, config: AgentConfig, requests: Requests, caller: Caller) -> agent_pb2.UploadBlobResponse:
    """Take a blob in; durable when this returns. Raises InvalidRequestError and FailedPreconditionError."""
    first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("event") != "start":
        raise InvalidRequestError("start", "start is missing: send it as the first message")
    start = first.start
    await asyncio.to_thread(_check_start, store, config, start, caller)
    blob = await obtained(partial(IncomingBlob, store), IncomingBlob.close)
    try:
        async for request in requests:
            _check_chunk(request, start, blob)
            await uninterrupted(asyncio.to_thread(blob.write, request.chunk))
        _check_end(start, blob)
        sha256 = await uninterrupted(asyncio.to_thread(blob.keep, caller.name, DEFAULT_MEDIA_TYPE))
    finally:
        await uninterrupted(asyncio.to_thread(blob.close))
    return agent_pb2.UploadBlobResponse(sha256=sha256, size_bytes=blob.size_bytes)


async def download(store: Store, sha256: str, caller: Caller) -> AsyncGenerator[agent_pb2.DownloadBlobResponse, None]:
    """The bytes of a blob, its size in every message. Raises InvalidRequestError and NotFoundError."""
    if SHA256.fullmatch(sha256) is None:
        raise InvalidRequestError("sha256", f"sha256 is {sha256[:80]!r}, but must be 64 lower-case hex digits")
    reader = None if caller.scope == "admin" else caller.name
    size = await asyncio.to_thread(held.readable_size, store, reader, sha256)
    if size is None:
        raise unknown_blob(sha256)
    try:
        file = await asyncio.to_thread(store.blob_path(sha256).open, "rb")
    except FileNotFoundError:
        raise unknown_blob(sha256) from None
    with file:
        yield agent_pb2.DownloadBlobResponse(size_bytes=size)
        while chunk := await asyncio.to_thread(file.read, DOWNLOAD_CHUNK_BYTES):
            yield agent_pb2.DownloadBlobResponse(size_bytes=size, chunk=chunk)


def unknown_blob(sha256: str) -> NotFoundError:
    """The refusal of a blob that is not there, or not this caller's: the two must look the same."""
    return NotFoundError(
        "blob",
        sha256,
        f"blob {sha256} was neither sent by this token nor given to it, or its time is over (agent.keep_uploads_s): "
        "send the bytes again",
    )


def _check_start(store: Store, config: AgentConfig, start: agent_pb2.UploadStart, caller: Caller) -> None:
    if start.sha256 and SHA256.fullmatch(start.sha256) is None:
        raise InvalidRequestError(
            "start.sha256",
            f"start.sha256 is {start.sha256[:80]!r}, but must be 64 lower-case hex digits: leave it out or send that "
            "of all bytes",
        )
    if start.size_bytes < 0:
        raise InvalidRequestError("start.size_bytes", f"start.size_bytes is {start.size_bytes}: send that of all bytes")
    if start.size_bytes > config.max_file_bytes:
        raise InvalidRequestError(
            "start.size_bytes",
            f"start.size_bytes is {start.size_bytes}, but at most {config.max_file_bytes} are taken "
            "(agent.max_file_bytes): send a smaller file",
        )
    if held.held_bytes(store, caller.name) + start.size_bytes > config.max_held_bytes:
        raise FailedPreconditionError(
            f"{caller.name!r} would hold more than {config.max_held_bytes} bytes of uploads (agent.max_held_bytes): "
            f"each is let go after {config.keep_uploads_s:g} s (agent.keep_uploads_s)"
        )


def _check_chunk(request: agent_pb2.UploadBlobRequest, start: agent_pb2.UploadStart, blob: IncomingBlob) -> None:
    if request.WhichOneof("event") != "chunk":
        raise InvalidRequestError("start", "start came twice or a message is empty: send chunks only")
    if len(request.chunk) > MAX_CHUNK_BYTES:
        raise InvalidRequestError(
            "chunk", f"chunk has {len(request.chunk)} bytes, but at most {MAX_CHUNK_BYTES} are taken: cut it smaller"
        )
    if blob.size_bytes + len(request.chunk) > start.size_bytes:
        raise InvalidRequestError(
            "chunk", f"chunk goes beyond the {start.size_bytes} bytes of start.size_bytes: announce the right size"
        )


def _check_end(start: agent_pb2.UploadStart, blob: IncomingBlob) -> None:
    if blob.size_bytes != start.size_bytes:
        raise InvalidRequestError(
            "start.size_bytes",
            f"start.size_bytes is {start.size_bytes}, but {blob.size_bytes} bytes came: announce the right size",
        )
    if start.sha256 and blob.sha256 != start.sha256:
        raise InvalidRequestError(
            "start.sha256",
            f"start.sha256 is {start.sha256}, but what came has {blob.sha256}: the bytes changed on the way",
        )
