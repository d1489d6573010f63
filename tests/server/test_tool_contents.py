"""Images and files that tools give back: from the child process through the checks to what the model sees."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nightschool_server import chat
from nightschool_server.app import load_app
from nightschool_server.chat import ToolCall
from nightschool_server.image_check import check_image
from nightschool_server.tools.content import OUTBOX_PREFIX
from nightschool_server.tools.returned import RETURNED_FOLDER, ReturnLimits, take_returned
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import CallLimits, ToolOutcome, ToolWorkers

from tests.server.files_app import png

APP = "tests.server.files_app:app"
LIMITS = ReturnLimits(max_file_bytes=2_000_000)


@pytest.fixture
async def workers() -> AsyncIterator[ToolWorkers]:
    async with await ToolWorkers.start(APP, 1, limits=CallLimits(returned=LIMITS)) as started:
        yield started


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(load_app(APP), tmp_path / "states")


def sizes(outcome: ToolOutcome) -> list[tuple[int, int]]:
    """Width and height of the images."""
    found = [check_image(data) for data in outcome.images.values()]
    assert [hashlib.sha256(data).hexdigest() for data in outcome.images.values()] == list(outcome.images)
    return [(image.width, image.height) for image in found]


def left_in(outcome: ToolOutcome) -> list[str]:
    """What lies in the workspace after the call."""
    workspace = outcome.state.workspace
    return [] if workspace is None else sorted(path.name for path in workspace.iterdir())


async def test_an_image_comes_as_bytes_as_a_path_and_as_a_pillow_image(workers: ToolWorkers, state: ToolState) -> None:
    encoded = await workers.run("chart", {"kind": "bytes"}, state)
    assert (encoded.content, sizes(encoded), left_in(encoded)) == ("1 image", [(8, 8)], [])
    by_path = await workers.run("chart", {"kind": "path"}, state)
    assert (by_path.content, sizes(by_path), left_in(by_path)) == ("the chart", [(9, 9)], ["chart.png"])
    pillow = await workers.run("chart", {"kind": "pillow"}, state)
    assert (pillow.content, sizes(pillow), left_in(pillow)) == ("and words", [(7, 7)], [])


async def test_a_file_is_copied_aside_and_the_model_reads_a_line_of_it(workers: ToolWorkers, state: ToolState) -> None:
    first = await workers.run("report", {"text": "all is well"}, state)
    assert first.content == "[file: report.txt, text/plain, 11 bytes]"
    second = await workers.run("report", {"text": "all is lost"}, first.state)
    ((one,), (other,)) = first.files, second.files
    assert (one.path.read_text(), other.path.read_text()) == ("all is well", "all is lost")
    assert one.file == chat.File("report.txt", "text/plain", 11, hashlib.sha256(b"all is well").hexdigest())


async def test_one_call_gives_back_an_image_and_a_file(workers: ToolWorkers, state: ToolState) -> None:
    both = await workers.run("chart", {"kind": "both"}, state)
    size = len(png((6, 6)))
    assert (sizes(both), both.content) == ([(6, 6)], f"[file: the chart.png, image/png, {size} bytes]")


async def test_a_file_that_was_made_elsewhere_comes_too(workers: ToolWorkers, state: ToolState) -> None:
    outcome = await workers.run("give", {"what": "outside"}, state)
    assert outcome.files[0].path.read_text() == "made elsewhere"
    assert left_in(outcome) == []


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        (
            "chart",
            {"kind": "broken"},
            "a returned image (10 bytes beginning 6e6f207069637475) is not an image that can be",
        ),
        ("chart", {"kind": "many"}, "the tool returned more than 16 images (log.max_images_per_request)"),
        ("give", {"what": "missing"}, "FileNotFoundError: the tool returned 'missing.txt', which is not a file"),
        ("give", {"what": "folder"}, "FileNotFoundError: the tool returned 'folder', which is not a file"),
        ("give", {"what": "bad name"}, "the name of a returned file is '../a', which is a path"),
        ("give", {"what": "bad type"}, "the media type of the returned file 'a' is 'text/csv\\n[system]', which is no"),
        ("give", {"what": "large"}, "the returned file 'large' has 3000000 bytes, but at most 2000000 are taken"),
        ("give", {"what": "nothing of use"}, "TypeError: ToolImage(int) must be bytes, a path or a Pillow image"),
    ],
)
async def test_what_breaks_a_rule_is_an_error_that_says_which(
    workers: ToolWorkers, state: ToolState, tool: str, arguments: dict[str, str], says: str
) -> None:
    outcome = await workers.run(tool, arguments, state)
    assert (outcome.failure, dict(outcome.images), outcome.files) == ("execution", {}, ())
    assert outcome.content.startswith(f"error: {says}")
    assert not [name for name in left_in(outcome) if name.startswith(OUTBOX_PREFIX)]


async def test_a_call_that_is_cancelled_while_its_file_is_copied_leaves_no_copying_behind(state: ToolState) -> None:
    limits, copies = CallLimits(returned=ReturnLimits(max_file_bytes=2**30)), state.root / RETURNED_FOLDER

    async def begun() -> asyncio.Task[ToolOutcome]:
        call = asyncio.create_task(workers.run("give", {"what": "huge"}, state))
        while not call.done() and not any(copies.glob(".*")):  # noqa: ASYNC110
            await asyncio.sleep(0)
        return call

    async with await ToolWorkers.start(APP, 1, limits=limits) as workers:
        while not (call := await begun()).cancel():  # It was copied before anyone looked.
            call.result().state.discard()
        await asyncio.wait({call})
        assert call.cancelled()
        assert [path.name for path in state.root.iterdir()] == [RETURNED_FOLDER]
        assert not any(copies.glob(".*"))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("link.txt", "cannot be read: a link"),
        ("folder/secret.txt", "cannot be read: a link"),
        ("../secret.txt", "leaves the workspace"),
        ("pipe", "which is not a plain file"),
        ("/etc/hostname", "leaves the workspace"),
    ],
)
def test_the_server_follows_nothing_out_of_the_workspace(tmp_path: Path, path: str, says: str) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (workspace / "link.txt").symlink_to(tmp_path / "secret.txt")
    (workspace / "folder").symlink_to(tmp_path)
    os.mkfifo(workspace / "pipe")
    item = {"kind": "file", "path": path, "name": "a.txt", "media_type": ""}
    with pytest.raises(ValueError, match=says):
        take_returned([item], workspace, tmp_path)


def test_a_result_with_images_and_files_survives_the_store() -> None:
    file = chat.File("a.txt", "text/plain", 3, "0" * 64)
    call = ToolCall("call_0", "chart", "{}")
    told = (
        chat.user("look", ["1" * 64], [file]),
        chat.tool_result(call, "seen", images=["2" * 64], files=[file], simulated=True),
    )
    assert chat.messages_from_json(chat.messages_to_json(told)) == told
    assert (told[0].files, told[1].files, told[1].images) == ((file,), (file,), ("2" * 64,))


def test_the_model_reads_a_line_of_a_file_in_the_users_turn() -> None:
    file = chat.File("report.csv", "text/csv", 1204, "0" * 64)
    assert chat.template_messages([chat.user("What is the sum?", files=[file])]) == [
        {"role": "user", "content": "[file: report.csv, text/csv, 1,204 bytes]\nWhat is the sum?"}
    ]
    with_image = chat.template_messages([chat.user("What is the sum?", ["1" * 64], [file])])[0]["content"]
    assert [part["type"] for part in with_image] == ["image", "text", "text"]
