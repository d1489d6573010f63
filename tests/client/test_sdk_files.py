"""Files through both clients and the command line, against the project's own server with a scripted engine."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from nightschool import AsyncClient, Client, File, Image, InvalidRequestError, NotFoundError, ToolReturned
from nightschool.cli import nightschool
from nightschool.files import INLINE_BYTES
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import GenerateRequest

from tests.harness import Running, server_thread
from tests.server.files_app import png
from tests.server.scripted_engine import ScriptedEngine


@dataclass
class World:
    """A server whose engine does as it is told."""

    server: Running
    engine: ScriptedEngine

    def says(self, *steps: str) -> None:
        def script(request: GenerateRequest) -> str:
            step = sum(message.role == "assistant" for message in request.prompt.messages)
            return steps[min(step, len(steps) - 1)]

        self.engine.script = script

    @property
    def token(self) -> str:
        return (self.server.home / "alice.token").read_text()

    def client(self) -> Client:
        return Client(self.server.address, token=self.token)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    home = tmp_path_factory.mktemp("sdk_files") / "home"
    with server_thread(home, {"agent.app": "tests.server.files_app:app"}, start) as server:
        yield World(server, engine)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text("40\n2\n")
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that does not go inside a request."""
    path = tmp_path / "numbers.txt"
    path.write_text("1\n" * INLINE_BYTES)
    return path


TOTAL = write_call("total", {"name": "numbers.txt"})


def test_a_path_and_a_file_of_bytes_go_with_a_task(world: World, numbers: Path) -> None:
    world.says(TOTAL, write_call("files", {}), "done")
    with world.client() as client:
        events = list(client.run_task("add up", files=[numbers, File("b.txt", b"1")]))
    returned = [event.result.content for event in events if isinstance(event, ToolReturned)]
    assert returned == ["42", '["b.txt","numbers.txt"]']


async def test_a_large_file_is_uploaded_by_itself(world: World, large: Path) -> None:
    world.says(TOTAL, "done")
    async with AsyncClient(world.server.address, token=world.token) as client:
        result = await client.run_task("add up", files=[str(large)]).result()
    (observed,) = (part for part in result.messages[1].parts)
    assert getattr(observed, "content", "") == str(INLINE_BYTES)
    shown = world.engine.requests[-1].prompt.messages[1].files
    assert [(file.name, file.size_bytes) for file in shown] == [("numbers.txt", 2 * INLINE_BYTES)]


def test_an_upload_serves_many_tasks_and_comes_down_again(world: World, large: Path, tmp_path: Path) -> None:
    world.says(TOTAL, "done")
    with world.client() as client:
        sent = client.upload(large)
        assert (sent.name, sent.size_bytes) == ("numbers.txt", 2 * INLINE_BYTES)
        assert sent.sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
        for _ in range(2):
            assert client.run_task("add up", files=[sent]).result().answer == "done"
        folder = tmp_path / "folder"
        folder.mkdir()
        assert client.download(sent, folder) == folder / "numbers.txt"
        assert client.download(sent.sha256, folder / "copy").read_bytes() == large.read_bytes()
        with pytest.raises(NotFoundError, match="neither sent by this token"):
            client.download("0" * 64, folder / "none")
        assert sorted(path.name for path in folder.iterdir()) == ["copy", "numbers.txt"]


async def test_what_tools_give_back_is_in_the_result(world: World, tmp_path: Path) -> None:
    world.says(write_call("report", {"text": "all is well"}), write_call("chart", {"kind": "path"}), "done")
    async with AsyncClient(world.server.address, token=world.token) as client:
        run = client.run_task("report")
        returned = [event.result async for event in run if isinstance(event, ToolReturned)]
        result = await run.result()
        assert [file.name for file in result.files] == ["report.txt"]
        assert (await client.download(result.files[0], tmp_path)).read_text() == "all is well"
        (picture,) = returned[1].images
        assert (await client.download(picture.sha256, tmp_path / "chart.png")).read_bytes() == png((9, 9))
        kept_nowhere = await client.run_task("report", learning="no_log").result()
        assert (await client.download(kept_nowhere.files[0], tmp_path / "again")).read_text() == "all is well"


def test_a_tool_of_the_client_gives_an_image_back(world: World) -> None:
    import PIL.Image

    def look(how: str) -> object:
        """Take a picture."""
        picture = PIL.Image.new("RGB", (3, 3)) if how == "pillow" else Image(data=png((2, 2)))
        return picture if how == "alone" else ["here it is", picture]

    for how, says in (("pillow", "here it is"), ("bytes", "here it is"), ("alone", "1 image")):
        world.says(write_call("look", {"how": how}), "done")
        with world.client() as client:
            client.run_task("look", tools=[look]).result()
        (result,) = world.engine.requests[-1].prompt.messages[-1].parts
        assert getattr(result, "content", "") == says
        assert len(world.engine.requests[-1].prompt.images) == 1


def test_what_can_be_saved_but_is_no_picture_is_text_as_ever(world: World) -> None:
    class Order:
        def save(self, fp: object, format: str) -> None:
            raise AssertionError("an order is no picture")

        def __str__(self) -> str:
            return "order 7"

    def order() -> object:
        """The last order."""
        return Order()

    world.says(write_call("order", {}), "done")
    with world.client() as client:
        client.run_task("order", tools=[order]).result()
    (result,) = world.engine.requests[-1].prompt.messages[-1].parts
    assert getattr(result, "content", "") == '"order 7"'


def test_what_is_no_file_is_refused_before_anything_is_sent(world: World) -> None:
    with world.client() as client:
        with pytest.raises(InvalidRequestError, match=r"files\[0\] is a int, but must be a path"):
            client.run_task("add up", files=[7])  # type: ignore[list-item]
        with pytest.raises(FileNotFoundError):
            client.run_task("add up", files=["no such file"])
        with pytest.raises(InvalidRequestError) as refused:
            client.run_task("add up", files=[File("../a", b"1")]).result()
        assert refused.value.field == "start.files[0].name"


def test_the_command_line_takes_files_and_saves_those_that_come_back(
    world: World, numbers: Path, tmp_path: Path
) -> None:
    world.says(TOTAL, write_call("report", {"text": "sum: 42"}), "done")
    saved = tmp_path / "saved"
    saved.mkdir()
    command = ["--address", world.server.address, "--token", world.token, "run", "add up"]
    ran = CliRunner().invoke(nightschool, [*command, "--file", str(numbers), "--save-to", str(saved)])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == "done\n"
    assert (saved / "report.txt").read_text() == "sum: 42"
    assert f"saved {saved / 'report.txt'}" in ran.stderr


async def test_both_clients_have_the_same_methods_for_files() -> None:
    for name in ("upload", "download"):
        assert asyncio.iscoroutinefunction(getattr(AsyncClient, name))
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__
