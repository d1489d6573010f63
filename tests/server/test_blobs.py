"""UploadBlob and DownloadBlob over real gRPC: chunks, bounds, who may read, what is kept once and for how long."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2
from nightschool_server.home import Home
from nightschool_server.store import held, request_rows
from nightschool_server.store.store import Store

from tests.harness import Metadata, Running, Stubs, failure, server_thread
from tests.server.scripted_engine import ScriptedEngine

MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    async def start() -> ScriptedEngine:
        return ScriptedEngine()

    settings = {"agent.max_file_bytes": str(48 * MIB), "agent.max_held_bytes": str(96 * MIB)}
    with server_thread(tmp_path_factory.mktemp("blobs") / "home", settings, start) as running:
        yield running


@pytest.fixture
async def wire(server: Running) -> AsyncIterator[Stubs]:
    async with server.stubs() as found:
        yield found


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pieces(
    data: bytes, *, size_bytes: int | None = None, sha256: str = "", chunk_bytes: int = MIB
) -> Iterator[agent_pb2.UploadBlobRequest]:
    """The messages of an upload."""
    size = len(data) if size_bytes is None else size_bytes
    yield agent_pb2.UploadBlobRequest(start=agent_pb2.UploadStart(size_bytes=size, sha256=sha256))
    for at in range(0, len(data), chunk_bytes):
        yield agent_pb2.UploadBlobRequest(chunk=data[at : at + chunk_bytes])


async def upload(wire: Stubs, metadata: Metadata, data: bytes) -> str:
    response = await wire.agent.UploadBlob(pieces(data), metadata=metadata)
    assert response.size_bytes == len(data)
    return response.sha256


async def download(wire: Stubs, metadata: Metadata, sha256: str) -> bytes:
    call = wire.agent.DownloadBlob(agent_pb2.DownloadBlobRequest(sha256=sha256), metadata=metadata)
    return b"".join([response.chunk async for response in call])


async def test_a_file_goes_up_in_chunks_and_comes_down_again(wire: Stubs, server: Running) -> None:
    data = b"0123456789" * 300_000
    sha256 = await upload(wire, server.user, data)
    assert sha256 == sha256_of(data)
    assert await download(wire, server.user, sha256) == data
    assert await download(wire, server.admin, sha256) == data
    assert await upload(wire, server.user, b"") == sha256_of(b"")
    assert await download(wire, server.user, sha256_of(b"")) == b""


async def test_forty_megabytes_pass_with_a_few_chunks_in_memory(wire: Stubs, server: Running) -> None:
    def zeros() -> Iterator[agent_pb2.UploadBlobRequest]:
        yield agent_pb2.UploadBlobRequest(start=agent_pb2.UploadStart(size_bytes=40 * MIB))
        for _ in range(40):
            yield agent_pb2.UploadBlobRequest(chunk=bytes(MIB))

    tracemalloc.start()
    try:
        response = await wire.agent.UploadBlob(zeros(), metadata=server.user)
        digest, size = hashlib.sha256(), 0
        request = agent_pb2.DownloadBlobRequest(sha256=response.sha256)
        async for part in wire.agent.DownloadBlob(request, metadata=server.user):
            digest.update(part.chunk)
            size += len(part.chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (digest.hexdigest(), size) == (response.sha256, 40 * MIB)
    # Client and server share this process: both hold their chunks in it.
    assert peak < 16 * MIB, f"{peak / MIB:.1f} MiB at once"


async def test_the_same_file_twice_is_stored_once(wire: Stubs, server: Running) -> None:
    data = b"the same" * 1000
    sha256 = await upload(wire, server.user, data)
    before = files_in(server.home)
    assert await upload(wire, server.user, data) == await upload(wire, server.other_user, data) == sha256
    assert files_in(server.home) == before
    assert len(server.runtime.store.query("SELECT 1 FROM blobs WHERE sha256 = ?", (sha256,))) == 1


async def test_nobody_reads_anothers_blob_by_its_hash(wire: Stubs, server: Running) -> None:
    sha256 = await upload(wire, server.user, b"alice's own")
    missing = sha256_of(b"nobody's")
    for hidden in (sha256, missing):
        error = await failure(download(wire, server.other_user, hidden))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert (
            error.message
            == f"blob {hidden} was neither sent by this token nor given to it, or its time is over "
            + ("(agent.keep_uploads_s): send the bytes again")
        ), "there and not there must look the same"
    await upload(wire, server.other_user, b"alice's own")
    assert await download(wire, server.other_user, sha256) == b"alice's own", "who has sent it may read it"


@pytest.mark.parametrize(
    ("requests", "field", "words"),
    [
        ([], "start", "start is missing"),
        (list(pieces(b"abc"))[1:], "start", "start is missing"),
        (list(pieces(b"abc", size_bytes=4)), "start.size_bytes", "start.size_bytes is 4, but 3 bytes came"),
        (list(pieces(b"abc", size_bytes=2)), "chunk", "beyond the 2 bytes of start.size_bytes"),
        (list(pieces(b"abc", size_bytes=-1)), "start.size_bytes", "start.size_bytes is -1"),
        (list(pieces(b"abc", sha256="ABC")), "start.sha256", "must be 64 lower-case hex digits"),
        (list(pieces(b"abc", sha256="0" * 64)), "start.sha256", f"but what came has {sha256_of(b'abc')}"),
        (
            list(pieces(b"", size_bytes=49 * MIB)),
            "start.size_bytes",
            "at most 50331648 are taken (agent.max_file_bytes)",
        ),
        (list(pieces(bytes(5 * MIB), chunk_bytes=5 * MIB)), "chunk", "at most 4194304 are taken"),
        ([*pieces(b"abc"), *pieces(b"")], "start", "start came twice"),
    ],
)
async def test_an_upload_that_breaks_a_rule_is_refused_by_its_field_and_leaves_nothing(
    wire: Stubs, server: Running, requests: list[agent_pb2.UploadBlobRequest], field: str, words: str
) -> None:
    before = files_in(server.home)
    error = await failure(wire.agent.UploadBlob(iter(requests), metadata=server.user))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert words in error.message
    assert files_in(server.home) == before


async def test_a_download_by_what_is_no_hash_is_refused(wire: Stubs, server: Running) -> None:
    error = await failure(download(wire, server.user, "../nightschool.db"))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sha256")


async def test_a_caller_holds_so_much_and_no_more(wire: Stubs, server: Running) -> None:
    metadata = server.other_user
    for number in (1, 2):
        await upload(wire, metadata, bytes([number]) * (40 * MIB))
    error = await failure(wire.agent.UploadBlob(pieces(b"", size_bytes=40 * MIB), metadata=metadata))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "'bob' would hold more than 100663296 bytes of uploads (agent.max_held_bytes)" in error.message


async def test_an_upload_that_is_cut_off_leaves_nothing(wire: Stubs, server: Running) -> None:
    before = files_in(server.home)
    call = wire.agent.UploadBlob(metadata=server.user)
    await call.write(agent_pb2.UploadBlobRequest(start=agent_pb2.UploadStart(size_bytes=3 * MIB)))
    await call.write(agent_pb2.UploadBlobRequest(chunk=bytes(MIB)))
    while files_in(server.home) == before:
        await wire.agent.ListModels(agent_pb2.ListModelsRequest(), metadata=server.user)
    call.cancel()
    while server.runtime.counters.num_in_flight["live"]:
        await wire.agent.ListModels(agent_pb2.ListModelsRequest(), metadata=server.user)
    assert files_in(server.home) == before


async def test_forgetting_a_caller_erases_what_only_it_holds(wire: Stubs, server: Running) -> None:
    mine, shared = await upload(wire, server.user, b"only mine"), await upload(wire, server.user, b"both have it")
    await upload(wire, server.other_user, b"both have it")
    await wire.admin.ForgetUser(admin_pb2.ForgetUserRequest(user="alice", request_id="f1"), metadata=server.admin)
    store = server.runtime.store
    assert (store.has_blob(mine), store.has_blob(shared)) == (False, True)
    assert (await failure(download(wire, server.user, shared))).code is grpc.StatusCode.NOT_FOUND
    assert await download(wire, server.other_user, shared) == b"both have it"


def test_what_nobody_has_used_for_a_while_is_swept(tmp_path: Path) -> None:
    store = Store.open(Home(tmp_path))
    source = tmp_path / "source"
    source.write_bytes(b"uploaded and never used")
    sha256 = held.hold_file(store, "alice", source, "text/plain")
    assert store.sweep_blobs(older_than_s=-1) == 0, "while it is held it stays"
    with store.transaction() as db:
        assert request_rows.delete_old_holders(db, time.time() - 60) == 0
        assert request_rows.delete_old_holders(db, time.time() + 60) == 1
    assert store.sweep_blobs(older_than_s=-1) == 1
    assert not store.has_blob(sha256)
    assert not store.blob_path(sha256).exists()
    store.close()


def files_in(home: Path) -> set[str]:
    """The names of everything under the blobs' folder."""
    return {path.name for path in (home / "blobs").rglob("*") if path.is_file()}
