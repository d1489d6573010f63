"""generate, stream, feedback and models, on both clients, against a real gRPC server."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from nightschool import (
    Answer,
    AsyncClient,
    Client,
    Delta,
    FinishReason,
    Image,
    InvalidRequestError,
    Message,
    Reply,
    Role,
    Started,
    StreamClosedError,
    Text,
    Tool,
    ToolChoice,
)
from nightschool_proto.v1 import content_pb2

from tests.client.fake_replies import endless_stream
from tests.client.fake_server import WAIT_S, FakeServer


def test_generate_returns_a_reply_with_shortcuts_to_its_first_answer(client: Client) -> None:
    reply = client.generate("hello", n=2)
    assert reply.text == "echo hello"
    assert reply.tool_calls == ()
    assert [answer.index for answer in reply.answers] == [0, 1]
    assert reply.answers[0].finish_reason == FinishReason.STOP
    assert (reply.response_id, reply.adapter) == ("resp_1", "3-abcdef01")
    assert reply.usage.prompt_tokens == 7
    assert reply.answers[0].tokens is None
    assert reply.message == Message(Role.ASSISTANT, (Text("echo hello"),))


def test_options_reach_the_wire_and_absent_ones_stay_absent(client: Client, server: FakeServer) -> None:
    client.generate(
        "hello", max_tokens=5, temperature=0.0, seed=7, stop=["END"], adapter="base", session_id="s1",
        learning="no_log", priority="practice", logprobs=True, top_logprobs=2, timeout_s=99,
    )  # fmt: skip
    (call,) = server.calls
    sampling = call.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, list(sampling.stop)) == (5, 0.0, 7, ["END"])
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_p")
    assert (call.request.adapter, call.request.session_id) == ("base", "s1")
    assert call.request.learning_policy == content_pb2.NO_LOG
    assert call.request.priority == content_pb2.PRACTICE
    assert call.request.request_id.startswith("req_")
    assert call.metadata["authorization"] == "Bearer secret"
    assert 0 < call.remaining_s < 100


def test_score_says_how_likely_a_given_answer_is(client: Client, server: FakeServer) -> None:
    scores = client.score("hello", "there", adapter="3-abcdef01", priority="practice")
    assert (scores.adapter, scores.num_prompt_tokens, scores.nats_per_token) == ("3-abcdef01", 1, 1.0)
    (call,) = server.calls
    assert (call.request.continuation, call.request.priority) == ("there", content_pb2.PRACTICE)
    with pytest.raises(TypeError, match="did you mean 'adapter'"):
        client.score("hello", "there", adapters="x")  # type: ignore[call-arg]


def test_an_unknown_option_is_a_type_error_with_the_nearest_name(client: Client) -> None:
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        client.generate("hello", max_token=5)  # type: ignore[call-arg]


def test_a_value_that_does_not_fit_names_its_field(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("hello", max_tokens="many")  # type: ignore[arg-type]
    assert caught.value.field == "max_tokens"
    with pytest.raises(InvalidRequestError, match="train, log_only, no_log"):
        client.generate("hello", learning="never")


class Picture:
    """Saves itself as Pillow's images do."""

    def save(self, fp: Any, format: str) -> None:
        fp.write(f"{format} bytes".encode())


def test_images_come_before_the_text_of_the_last_user_turn(client: Client, server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"from a file")
    client.generate("look", images=[b"raw", path, Picture(), Image(sha256="ab" * 32)])
    parts = server.calls[0].request.messages[0].parts
    assert [part.image.data for part in parts[:3]] == [b"raw", b"from a file", b"PNG bytes"]
    assert parts[3].image.sha256 == "ab" * 32
    assert parts[4].text == "look"


def test_conversations_may_be_dictionaries_or_messages(client: Client, server: FakeServer) -> None:
    client.generate(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": b"raw"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "tool_calls": [{"id": "c1", "name": "look", "arguments": {"at": "left"}}]},
            {"role": "tool", "call_id": "c1", "name": "look", "content": "a cat"},
            Message(Role.USER, (Text("And now?"),)),
        ]
    )
    turns = server.calls[0].request.messages
    roles = content_pb2.Message
    assert [turn.role for turn in turns] == [roles.SYSTEM, roles.USER, roles.ASSISTANT, roles.TOOL, roles.USER]
    assert turns[1].parts[0].image.data == b"raw"
    assert turns[2].parts[0].tool_call.arguments_json == '{"at": "left"}'
    assert turns[3].parts[0].tool_result.content == "a cat"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "messages[0].content[0].image"),
        ([3], "messages[0]"),
    ],
)
def test_a_conversation_that_cannot_be_read_names_the_place(client: Client, messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(messages)
    assert caught.value.field == field


def test_images_need_a_last_turn_of_the_user(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="images"):
        client.generate([{"role": "assistant", "content": "hm"}], images=[b"raw"])


def test_tools_are_sent_as_json_schema(client: Client, server: FakeServer) -> None:
    client.generate("hello", tools=[Tool("look", "Looks.", {"type": "object", "properties": {}})])
    (tool,) = server.calls[0].request.tools
    assert (tool.name, tool.parameters_json, tool.strict) == ("look", '{"properties": {}, "type": "object"}', False)


def test_strict_tools_and_the_choice_of_a_call_are_sent(client: Client, server: FakeServer) -> None:
    def look(where: str) -> str:
        """Looks."""
        return where

    client.generate("hello", tools=[Tool.of(look, strict=True), look], tool_choice="required")
    client.generate("hello", tools=[look], tool_choice=ToolChoice.AUTO)
    first, second = (call.request for call in server.calls)
    assert [tool.strict for tool in first.tools] == [True, False]
    assert (first.tool_choice, second.tool_choice) == (content_pb2.REQUIRED, content_pb2.AUTO)
    with pytest.raises(InvalidRequestError, match="must be one of auto, required"):
        client.generate("hello", tools=[look], tool_choice="any")


def test_a_stream_gives_text_and_the_reply_afterwards(client: Client) -> None:
    stream = client.stream("hello there")
    assert list(stream) == ["echo ", "hello ", "there "]
    assert stream.reply.text == "echo hello there "
    assert stream.reply.adapter == "3-abcdef01"


def test_a_stream_has_typed_events(client: Client) -> None:
    events = list(client.stream("hello").events())
    assert [type(event) for event in events] == [Started, Delta, Delta, Answer, Reply]


def test_text_arrives_while_the_call_still_runs(client: Client, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    with client.stream("hello") as stream:
        assert next(iter(stream)) == "first"
    assert server.calls[0].ended.wait(WAIT_S)


def test_leaving_the_loop_cancels_the_call(client: Client, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    stream = client.stream("hello")
    for text in stream:
        assert text == "first"
        break
    assert server.calls[0].ended.wait(WAIT_S)
    with pytest.raises(StreamClosedError):
        _ = stream.reply
    with pytest.raises(StreamClosedError, match="once"):
        list(stream)


def test_another_thread_may_close_a_stream(client: Client, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    stream, seen = client.stream("hello"), threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in stream:
                seen.set()
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert seen.wait(WAIT_S)
    stream.close()
    reader.join(WAIT_S)
    assert not reader.is_alive()
    assert [type(error).__name__ for error in errors] == ["CancelledError"]


def test_closing_the_client_ends_its_streams(server: FakeServer, tmp_path: Path) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    with Client(server.address, token="secret", home=tmp_path) as client:
        texts = iter(client.stream("hello"))
        assert next(texts) == "first"
    assert server.calls[0].ended.wait(WAIT_S)


def test_many_threads_share_one_client(client: Client) -> None:
    replies: dict[int, str] = {}

    def call(number: int) -> None:
        replies[number] = "".join(client.stream(f"number {number}")) + client.generate(f"n {number}").text

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert replies == {number: f"echo number {number} echo n {number}" for number in range(8)}


def test_feedback_carries_a_verdict_and_words(client: Client, server: FakeServer) -> None:
    assert client.feedback("resp_1", good=False, comment="too long", correction="No.") == "fb_1"
    request = server.calls[0].request
    assert (request.response_id, request.good, request.WhichOneof("value")) == ("resp_1", False, "good")
    assert (request.comment, request.correction) == ("too long", "No.")
    client.feedback("resp_1", score=0.0)
    assert server.calls[1].request.WhichOneof("value") == "score"
    with pytest.raises(InvalidRequestError, match="both"):
        client.feedback("resp_1", good=True, score=1.0)


def test_models_come_from_all_pages(client: Client) -> None:
    assert [model.name for model in client.models()] == ["base", "1-a", "2-b"]


async def test_the_async_client_gives_what_the_blocking_one_gives(client: Client, aclient: AsyncClient) -> None:
    assert await aclient.generate("hello", n=3) == client.generate("hello", n=3)
    assert await aclient.models() == client.models()
    assert await aclient.feedback("resp_1", good=True) == client.feedback("resp_1", good=True)
    stream, other = client.stream("hello"), aclient.stream("hello")
    assert [text async for text in other] == list(stream)
    assert other.reply == stream.reply
    events = [event async for event in aclient.stream("hello").events()]
    assert events == list(client.stream("hello").events())


async def test_leaving_an_async_loop_cancels_the_call(aclient: AsyncClient, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    async with aclient.stream("hello") as stream:
        async for text in stream:
            assert text == "first"
            break
    assert server.calls[0].ended.wait(WAIT_S)


async def test_leaving_an_async_loop_is_enough_to_cancel(aclient: AsyncClient, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    stream = aclient.stream("hello")
    async for text in stream:
        assert text == "first"
        break
    assert await asyncio.to_thread(server.calls[0].ended.wait, WAIT_S)


async def test_cancelling_the_awaiting_task_cancels_the_call(aclient: AsyncClient, server: FakeServer) -> None:
    server.script["StreamGenerate"].append(endless_stream)
    stream = aclient.stream("hello")

    seen = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            seen.set()

    reading = asyncio.create_task(read())
    await seen.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await asyncio.to_thread(server.calls[0].ended.wait, WAIT_S)


async def test_a_blocking_client_may_be_used_inside_a_running_loop(client: Client) -> None:
    assert "".join(client.stream("hello")) == "echo hello "
    assert client.models()[0].name == "base"
