"""The SDK and the command line against the project's own server, a process of its own, with the example's model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nightschool import (
    AlreadyExistsError,
    AsyncClient,
    Client,
    ContextOverflowError,
    InvalidRequestError,
    MessageTooLargeError,
    NotFoundError,
    Started,
    TaskResult,
    Tool,
    UnauthenticatedError,
)

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from nightschool.cli import main; main()")
SERVE = ("serve", "--model", "examples/shop/model", "--app", "examples.shop.app:app", "--port", "0", "--no-learner")


@dataclass(frozen=True)
class School:
    """A running server and its home folder."""

    home: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "--home", str(self.home), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())


def environment() -> dict[str, str]:
    """This process's environment without its own settings of nightschool."""
    return {key: value for key, value in os.environ.items() if not key.startswith("NIGHTSCHOOL")}


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    home = tmp_path_factory.mktemp("school")
    command = [*COMMAND, "--home", str(home), *SERVE]
    errors = home / "stderr.txt"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            log.write(line)
            if line.startswith("serving "):
                break
        else:
            pytest.fail(f"the server did not start: {errors.read_text()[-2000:]}")
        # A full pipe would stop the server in the middle of a log line.
        drain = threading.Thread(target=log.writelines, args=(process.stderr,))
        drain.start()
        yield School(home)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
        drain.join()
    assert process.returncode == 0
    assert not (home / "server.json").exists()


def where(thing: str) -> str:
    """Where a thing stands."""
    return f"{thing}: shelf 3"


def test_a_client_with_nothing_but_the_home_streams_works_and_gives_feedback(school: School) -> None:
    with Client(home=school.home) as client:
        stream = client.stream("Write one word.", max_tokens=8, seed=1)
        text = "".join(stream)
        assert text == stream.reply.text
        assert stream.reply.adapter == "base"
        events = list(client.run_task("How much are 3 mugs?", tools=[where], max_steps=2, max_tokens=48))
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], TaskResult)
        assert client.feedback(stream.reply.response_id, good=True).startswith("fb_")
        assert client.admin.status().requests_served >= 3


async def test_both_clients_get_the_same_seeded_reply(school: School) -> None:
    with Client(home=school.home) as client:
        blocking = client.generate("Hello.", max_tokens=8, seed=3, n=2, logprobs=True)
    async with AsyncClient(home=school.home) as aclient:
        awaited = await aclient.generate("Hello.", max_tokens=8, seed=3, n=2, logprobs=True)
    assert [answer.text for answer in blocking.answers] == [answer.text for answer in awaited.answers]
    tokens = blocking.answers[0].tokens
    assert tokens is not None
    assert len(tokens.ids) == len(tokens.logprobs) > 0


def test_a_request_id_answers_once(school: School) -> None:
    with Client(home=school.home) as client:
        first = client.generate("Hello.", max_tokens=4, request_id="once")
        assert client.generate("Hello.", max_tokens=4, request_id="once") == first
        with pytest.raises(AlreadyExistsError):
            client.generate("Bye.", max_tokens=4, request_id="once")


def test_bad_input_comes_back_typed_with_its_field(school: School) -> None:
    with Client(home=school.home) as client:
        with pytest.raises(InvalidRequestError) as negative:
            client.generate("Hello.", max_tokens=-3)
        assert negative.value.field == "sampling.max_tokens"
        with pytest.raises(NotFoundError) as unknown:
            client.generate("Hello.", adapter="9-deadbeef")
        assert unknown.value.resource is not None
        assert unknown.value.resource.name == "9-deadbeef"
        with pytest.raises(ContextOverflowError):
            client.generate("x" * 100_000)
        with pytest.raises(InvalidRequestError, match=r"tools\[0\]"):
            client.generate("Hello.", tools=[Tool("t", "Does.", {"type": "array"})])
        with pytest.raises(MessageTooLargeError):
            client.generate("Look.", images=[bytes(65 * 2**20)])
        assert client.generate("Hello.", max_tokens=2).text is not None
    with Client(home=school.home, token="wrong") as stranger, pytest.raises(UnauthenticatedError):
        stranger.generate("Hello.")


def test_the_command_line_finds_its_server_and_token(school: School) -> None:
    found = school.run("status", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["healthy"] is True
    assert school.run("generate", "Hello.", "--max-tokens", "4", "--stream").returncode == 0
    assert school.run("adapters", "show", "9-deadbeef").returncode == 2
    assert "adapters list" in school.run("adapters", "show", "9-deadbeef").stderr


def test_the_learner_is_paused_and_a_cycle_waits_for_it(school: School) -> None:
    with Client(home=school.home) as client:
        assert client.admin.learner.pause(reason="test").paused
        queued = client.admin.cycles.trigger(reason="test")
        assert next(client.admin.cycles.watch(queued.id)).id == queued.id
        assert client.admin.cycles.cancel(queued.id, reason="test").id == queued.id
        assert not client.admin.learner.resume().paused
