"""A task's files over real gRPC: into the workspace, past the model as lines, out of the tools, into the store."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import GenerateRequest

from tests.harness import Metadata, Running, Stubs, failure, server_thread
from tests.server.files_app import png
from tests.server.scripted_engine import ScriptedEngine

NUMBERS = b"1\n2\n39\n"
TOTAL = write_call("total", {"name": "numbers.txt"})
FINAL = "the answer is there."
TRAIN, NO_LOG = content_pb2.TRAIN, content_pb2.NO_LOG


@dataclass
class World:
    """A server whose engine does as it is told."""

    server: Running
    engine: ScriptedEngine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    settings = {
        "agent.app": "tests.server.files_app:app",
        "agent.max_files": "3",
        "agent.max_file_bytes": "1000000",
        "agent.max_files_bytes": "1500000",
    }
    with server_thread(tmp_path_factory.mktemp("files") / "home", settings, start) as server:
        yield World(server, engine)


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Stubs]:
    world.engine.requests.clear()
    async with world.server.stubs() as found:
        yield found


def says(world: World, *steps: str) -> None:
    """The model's steps in order; the last one is repeated."""

    def script(request: GenerateRequest) -> str:
        step = sum(message.role == "assistant" for message in request.prompt.messages)
        return steps[min(step, len(steps) - 1)]

    world.engine.script = script


def file(name: str = "numbers.txt", data: bytes = NUMBERS, **fields: Any) -> content_pb2.File:
    return content_pb2.File(name=name, **({"data": data} if "sha256" not in fields else {}), **fields)


def image(data: bytes) -> content_pb2.Image:
    return content_pb2.Image(data=data)


def start(*files: content_pb2.File, images: tuple[bytes, ...] = (), **fields: Any) -> agent_pb2.RunTaskRequest:
    parts = [*(content_pb2.Part(image=image(data)) for data in images), content_pb2.Part(text="do it")]
    messages = [content_pb2.Message(role=content_pb2.Message.USER, parts=parts)]
    return agent_pb2.RunTaskRequest(start=agent_pb2.TaskStart(messages=messages, files=files, **fields))


async def run(
    wire: Stubs, metadata: Metadata, first: agent_pb2.RunTaskRequest, answer: content_pb2.ToolResult | None = None
) -> list[agent_pb2.RunTaskResponse]:
    """Every event of a task; tool requests are answered with `answer` under their id."""
    call = wire.agent.RunTask(metadata=metadata)
    await call.write(first)
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
        if event.HasField("tool_request") and answer is not None:
            result = content_pb2.ToolResult()
            result.CopyFrom(answer)
            result.call_id = event.tool_request.id
            await call.write(agent_pb2.RunTaskRequest(tool_result=result))
    await call.done_writing()
    return events


def results(events: list[agent_pb2.RunTaskResponse]) -> list[str]:
    return [event.tool_result.content for event in events if event.HasField("tool_result")]


async def upload(wire: Stubs, metadata: Metadata, data: bytes) -> str:
    async def requests() -> AsyncIterator[agent_pb2.UploadBlobRequest]:
        yield agent_pb2.UploadBlobRequest(start=agent_pb2.UploadStart(size_bytes=len(data)))
        yield agent_pb2.UploadBlobRequest(chunk=data)

    return (await wire.agent.UploadBlob(requests(), metadata=metadata)).sha256


async def download(wire: Stubs, metadata: Metadata, sha256: str) -> bytes:
    call = wire.agent.DownloadBlob(agent_pb2.DownloadBlobRequest(sha256=sha256), metadata=metadata)
    return b"".join([response.chunk async for response in call])


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_a_tasks_files_are_in_its_workspace_and_the_model_is_told_of_them(wire: Stubs, world: World) -> None:
    says(world, TOTAL, write_call("files", {}), FINAL)
    events = await run(wire, world.server.user, start(file(), file("b.csv", b"x" * 1204), images=(png(),)))
    assert results(events) == ["42", '["b.csv","numbers.txt"]']
    turn = world.engine.requests[0].prompt.messages[-1]
    assert [type(part).__name__ for part in turn.parts] == ["Image", "File", "File", "Text"]
    assert [shown.line for shown in turn.files] == [
        "[file: numbers.txt, text/plain, 7 bytes]\n",
        "[file: b.csv, text/csv, 1,204 bytes]\n",
    ]


async def test_an_uploaded_file_is_named_by_its_sha256_and_tools_change_a_copy(wire: Stubs, world: World) -> None:
    says(world, write_call("append", {"name": "numbers.txt", "number": 8}), TOTAL, FINAL)
    sha256 = await upload(wire, world.server.user, NUMBERS)
    for _ in range(2):
        events = await run(wire, world.server.user, start(file(sha256=sha256)))
        assert results(events) == ["4 numbers", "50"], "the next task begins with what was uploaded"
    assert await download(wire, world.server.user, sha256) == NUMBERS


async def test_what_a_task_brings_is_logged_and_stays_as_long_as_its_row(wire: Stubs, world: World) -> None:
    says(world, TOTAL, FINAL)
    data = b"7\n7\n7\n"
    events = await run(wire, world.server.user, start(file(data=data), request_id="logged-1", learning_policy=TRAIN))
    store, sha256 = world.server.runtime.store, sha256_of(data)
    response_id = events[0].started.response_id
    named = store.query("SELECT sha256 FROM request_blobs WHERE response_id = ?", (response_id,))
    assert [row["sha256"] for row in named] == [sha256]
    (turn,) = store.query("SELECT parts FROM messages WHERE response_id = ? AND role = 'user'", (response_id,))
    assert f'"sha256":"{sha256}"' in turn["parts"]
    with store.transaction() as db:
        db.execute("DELETE FROM blob_holders")
    store.sweep_blobs(older_than_s=-1)
    assert await download(wire, world.server.user, sha256) == data
    error = await failure(download(wire, world.server.other_user, sha256))
    assert error.code is grpc.StatusCode.NOT_FOUND


async def test_files_that_tools_give_back_are_listed_and_can_be_fetched(wire: Stubs, world: World) -> None:
    calls = [write_call("report", {"text": text}) for text in ("first", "second")]
    says(world, *calls, write_call("chart", {"kind": "both"}), FINAL)
    events = await run(wire, world.server.user, start())
    given = [f for event in events if event.HasField("tool_result") for f in event.tool_result.files]
    assert [(f.name, f.size_bytes) for f in given[:2]] == [("report.txt", 5), ("report.txt", 6)]
    assert await download(wire, world.server.user, given[0].sha256) == b"first", "each as it was when it was given"
    finished = events[-1].finished
    assert [(f.name, f.media_type) for f in finished.files] == [
        ("report.txt", "text/plain"),
        ("the chart.png", "image/png"),
    ]
    assert await download(wire, world.server.user, finished.files[0].sha256) == b"second"
    assert (await failure(download(wire, world.server.other_user, finished.files[0].sha256))).reason == "NOT_FOUND"


async def test_the_model_sees_a_tools_image_and_the_log_keeps_it(wire: Stubs, world: World) -> None:
    says(world, write_call("chart", {"kind": "path"}), FINAL)
    events = await run(wire, world.server.user, start(request_id="image-1"))
    sha256 = sha256_of(png((9, 9)))
    prompt = world.engine.requests[-1].prompt
    assert (prompt.messages[-1].images, prompt.images[sha256]) == ((sha256,), png((9, 9)))
    (told,) = [event.tool_result for event in events if event.HasField("tool_result")]
    assert [shown.sha256 for shown in told.images] == [sha256]
    assert [shown.sha256 for shown in events[-1].finished.messages[1].parts[0].tool_result.images] == [sha256]
    assert await download(wire, world.server.user, sha256) == png((9, 9))


async def test_a_clients_tool_may_give_an_image_back(wire: Stubs, world: World) -> None:
    tool = content_pb2.Tool(name="look", description="takes a picture", parameters_json='{"type": "object"}')
    says(world, write_call("look", {}), FINAL)
    answer = content_pb2.ToolResult(name="look", content="here", images=[image(png((5, 5)))])
    await run(wire, world.server.user, start(client_tools=[tool]), answer)
    prompt = world.engine.requests[-1].prompt
    assert list(prompt.images.values()) == [png((5, 5))]
    broken = content_pb2.ToolResult(name="look", content="here", images=[image(b"no picture")])
    error = await failure(run(wire, world.server.user, start(client_tools=[tool]), broken))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "tool_result.images[0].data")


@pytest.mark.parametrize(
    ("files", "field", "words"),
    [
        ([file("../numbers.txt")], "start.files[0].name", "is '../numbers.txt', which is a path"),
        ([file("/etc/passwd")], "start.files[0].name", "which is a path"),
        ([file("a\\b")], "start.files[0].name", "which is a path"),
        ([file("..")], "start.files[0].name", "which is a path"),
        ([file("")], "start.files[0].name", "is empty"),
        ([file("x" * 256)], "start.files[0].name", "has 256 bytes, but may have at most 255"),
        ([file("a\nb")], "start.files[0].name", "printable characters only"),
        ([file("a\x00b")], "start.files[0].name", "printable characters only"),
        ([file(), file()], "start.files[1].name", "is 'numbers.txt', as start.files[0].name is"),
        ([file(media_type="text")], "start.files[0].media_type", "is 'text', which is no media type"),
        ([content_pb2.File(name="a")], "start.files[0]", "has neither data nor sha256"),
        ([file(sha256="ABC")], "start.files[0].sha256", "must be 64 lower-case hex digits"),
        ([file(sha256="0" * 64)], "start.files[0].sha256", "was neither uploaded by this token nor given to it"),
        ([file(data=bytes(1_000_001))], "start.files[0].data", "at most 1000000 are taken (agent.max_file_bytes)"),
        ([file(n, bytes(900_000)) for n in "ab"], "start.files", "at most 1500000 are taken (agent.max_files_bytes)"),
        ([file(n) for n in "abcd"], "start.files", "has 4 files, but at most 3 are taken (agent.max_files)"),
    ],
)
async def test_a_file_that_breaks_a_rule_is_refused_by_its_field(
    wire: Stubs, world: World, files: list[content_pb2.File], field: str, words: str
) -> None:
    error = await failure(run(wire, world.server.user, start(*files)))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert words in error.message
    assert not world.engine.requests


async def test_nobody_brings_anothers_file_by_its_hash(wire: Stubs, world: World) -> None:
    sha256 = await upload(wire, world.server.user, b"alice's own")
    error = await failure(run(wire, world.server.other_user, start(file(sha256=sha256))))
    assert error.field == "start.files[0].sha256"


async def test_a_file_is_no_image_because_its_hash_is_named_as_one(wire: Stubs, world: World) -> None:
    sha256 = await upload(wire, world.server.user, b"a,b\n1,2\n")
    part = content_pb2.Part(image=content_pb2.Image(sha256=sha256))
    message = content_pb2.Message(role=content_pb2.Message.USER, parts=[part])
    error = await failure(run(wire, world.server.user, agent_pb2.RunTaskRequest(start={"messages": [message]})))
    assert error.field.endswith("messages[0].parts[0].image.sha256")
    assert "is not an image that can be read" in error.message


async def test_no_log_keeps_no_file(wire: Stubs, world: World) -> None:
    says(world, TOTAL, write_call("report", {"text": "secret report"}), FINAL)
    store = world.server.runtime.store
    uploaded = await upload(wire, world.server.user, b"4\n4\n")
    inline = file("inline.txt", b"secret inline")
    first = start(file(sha256=uploaded), inline, learning_policy=NO_LOG, request_id="nolog-1")
    events = await run(wire, world.server.user, first)
    assert results(events)[0] == "8"
    (given,) = events[-1].finished.files
    assert (given.name, given.data) == ("report.txt", b"secret report"), "kept nowhere, it comes at once"
    for data in (b"4\n4\n", b"secret inline", b"secret report"):
        assert not store.has_blob(sha256_of(data))
        assert not store.blob_path(sha256_of(data)).exists()
    assert not list((world.server.home / "workspaces").glob("*"))


async def test_a_repeat_gets_the_same_files_although_the_upload_is_gone(wire: Stubs, world: World) -> None:
    says(world, write_call("report", {"text": "again"}), FINAL)
    sha256 = await upload(wire, world.server.other_user, b"5\n")
    first = start(file(sha256=sha256), request_id="repeat-1")
    once = await run(wire, world.server.other_user, first)
    held = world.server.runtime.store
    with held.transaction() as db:
        db.execute("DELETE FROM blob_holders WHERE sha256 = ?", (sha256,))
    again = await run(wire, world.server.other_user, first)
    assert again[-1].finished.files == once[-1].finished.files


async def test_forgetting_a_caller_erases_its_files_but_not_those_that_others_have(wire: Stubs, world: World) -> None:
    says(world, write_call("report", {"text": "of alice"}), FINAL)
    shared = b"both have it"
    first = start(file(data=b"of alice alone"), file("shared", shared), request_id="forget-1")
    await run(wire, world.server.user, first)
    says(world, FINAL)
    await run(wire, world.server.other_user, start(file("shared", shared), request_id="forget-1"))
    await wire.admin.ForgetUser(admin_pb2.ForgetUserRequest(user="alice", request_id="f1"), metadata=world.server.admin)
    store = world.server.runtime.store
    known = [store.has_blob(sha256_of(data)) for data in (b"of alice alone", b"of alice", shared)]
    assert known == [False, False, True]


def test_files_of_tasks_that_a_killed_server_ran_are_gone_when_the_next_one_starts(tmp_path: Path) -> None:
    async def start() -> ScriptedEngine:
        return ScriptedEngine()

    left = tmp_path / "home" / "workspaces" / "resp_killed" / "workspace-a" / "secret.txt"
    left.parent.mkdir(parents=True)
    left.write_text("secret")
    with server_thread(tmp_path / "home", engine=start):
        assert not left.exists()
