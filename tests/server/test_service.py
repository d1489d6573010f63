"""AgentService on the real tiny model over real channels: answers, streams, sessions, repeats, bad input."""

from __future__ import annotations

import asyncio
import hashlib
import io

import grpc
import PIL.Image
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2

from tests.harness import Running, Stubs, ask, failure


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (32, 32), color).save(buffer, "PNG")
    return buffer.getvalue()


def look_at(*images: content_pb2.Image) -> list[content_pb2.Message]:
    parts = [content_pb2.Part(image=image) for image in images]
    return [content_pb2.Message(role=content_pb2.Message.USER, parts=[*parts, content_pb2.Part(text="What is it?")])]


async def events_of(stream: grpc.aio.UnaryStreamCall) -> list[agent_pb2.StreamGenerateResponse]:
    return [event async for event in stream]


async def test_an_answer_names_its_response_adapter_usage_and_end(shop: Stubs, shop_server: Running) -> None:
    reply = await shop.agent.Generate(ask("hello", ignore_eos=True), metadata=shop_server.user)
    assert reply.response_id.startswith("resp_")
    assert reply.adapter == "base"
    assert reply.answers[0].finish_reason == content_pb2.LENGTH
    assert reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens > 0
    assert not reply.answers[0].HasField("tokens")


async def test_a_stream_begins_with_started_and_its_deltas_make_the_answer(shop: Stubs, shop_server: Running) -> None:
    request = ask("hello", ignore_eos=True, logprobs=True, top_logprobs=2, n=3, temperature=1.0, seed=5)
    events = await events_of(shop.agent.StreamGenerate(request, metadata=shop_server.user))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "usage"
    answers = {event.finished.index: event.finished for event in events if event.HasField("finished")}
    assert sorted(answers) == [0, 1, 2]
    for index, answer in answers.items():
        deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
        assert "".join(delta.text for delta in deltas) == answer.text
        assert [i for delta in deltas for i in delta.tokens.ids] == list(answer.tokens.ids)
        assert len(answer.tokens.ids) == len(answer.tokens.logprobs) == len(answer.tokens.top) == 8
        assert all(len(top.ids) == 2 for top in answer.tokens.top)
    assert events[-1].usage.completion_tokens == 24
    whole = await shop.agent.Generate(request, metadata=shop_server.user)
    assert {answer.index: answer.text for answer in whole.answers} == {i: a.text for i, a in answers.items()}


async def test_an_image_is_sent_once_and_then_named(shop: Stubs, shop_server: Running) -> None:
    data = png("red")
    sha256 = hashlib.sha256(data).hexdigest()
    by_bytes = ask("", messages=look_at(content_pb2.Image(data=data)))
    first = await shop.agent.Generate(by_bytes, metadata=shop_server.user)
    by_name = ask("", messages=look_at(content_pb2.Image(sha256=sha256)))
    again = await shop.agent.Generate(by_name, metadata=shop_server.user)
    assert again.answers[0].text == first.answers[0].text


async def test_an_image_sent_with_no_log_cannot_be_named_later(shop: Stubs, shop_server: Running) -> None:
    data = png("blue")
    secret = ask("", messages=look_at(content_pb2.Image(data=data)), learning_policy=content_pb2.NO_LOG)
    await shop.agent.Generate(secret, metadata=shop_server.user)
    sha256 = hashlib.sha256(data).hexdigest()
    by_name = ask("", messages=look_at(content_pb2.Image(sha256=sha256)))
    found = await failure(shop.agent.Generate(by_name, metadata=shop_server.user))
    assert (found.code, found.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages[0].parts[0].image.sha256",
    )
    assert "send the image's bytes" in found.message


BAD = {
    "an unknown adapter": (
        ask("hi", adapter="9999-cafecafe"),
        grpc.StatusCode.NOT_FOUND,
        "UNKNOWN_ADAPTER",
        "",
        "9999-cafecafe",
    ),
    "an image that is not one": (
        ask("", messages=look_at(content_pb2.Image(data=b"GIF89a, or so they say"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "messages[0].parts[0].image.data",
        "not an image",
    ),
    "a malformed tool schema": (
        ask("hi", tools=[content_pb2.Tool(name="f", parameters_json='{"type": "object", "required": 3}')]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "tools[0].parameters_json",
        "required",
    ),
    "a prompt over the context": (
        ask("word " * 5000),
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_OVERFLOW",
        "messages",
        "2048",
    ),
    "an answer over the context": (
        ask("hi", max_tokens=100_000),
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_OVERFLOW",
        "sampling.max_tokens",
        "at most",
    ),
    "negative max_tokens": (
        ask("hi", max_tokens=-5),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "sampling.max_tokens",
        "-5",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_gets_its_status_field_value_and_remedy_and_the_server_goes_on(
    name: str, shop: Stubs, shop_server: Running
) -> None:
    request, code, reason, field, says = BAD[name]
    for call in (
        shop.agent.Generate(request, metadata=shop_server.user),
        events_of(shop.agent.StreamGenerate(request, metadata=shop_server.user)),
    ):
        found = await failure(call)
        assert (found.code, found.reason, found.field) == (code, reason, field)
        assert says in found.message
    assert (await shop.agent.Generate(ask("hi"), metadata=shop_server.user)).answers


async def test_a_message_over_the_limit_is_refused_with_its_size(shop: Stubs, shop_server: Running) -> None:
    found = await failure(shop.agent.Generate(ask("x" * (65 * 2**20)), metadata=shop_server.user))
    assert (found.code, found.reason, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "request")
    assert "67108864" in found.message
    assert "server.max_message_bytes" in found.message
    assert (await shop.agent.Generate(ask("hi"), metadata=shop_server.user)).answers


async def test_a_user_may_neither_administer_nor_practise(shop: Stubs, shop_server: Running) -> None:
    status = admin_pb2.GetStatusRequest()
    assert (await failure(shop.admin.GetStatus(status, metadata=shop_server.user))).reason == "PERMISSION_DENIED"
    assert (await failure(shop.admin.GetStatus(status))).reason == "UNAUTHENTICATED"
    practice = ask("hi", priority=content_pb2.PRACTICE)
    assert (await failure(shop.agent.Generate(practice, metadata=shop_server.user))).reason == "PERMISSION_DENIED"
    assert (await shop.agent.Generate(practice, metadata=shop_server.admin)).answers


async def test_cancelling_a_stream_frees_the_engine(shop: Stubs, shop_server: Running) -> None:
    stream = shop.agent.StreamGenerate(ask("hi", max_tokens=1900, ignore_eos=True), metadata=shop_server.user)
    while not (await stream.read()).HasField("delta"):
        pass
    stream.cancel()
    await until_idle(shop, shop_server)


async def test_a_deadline_frees_the_engine(shop: Stubs, shop_server: Running) -> None:
    request = ask("hi", max_tokens=1900, ignore_eos=True, n=8)
    found = await failure(shop.agent.Generate(request, metadata=shop_server.user, timeout=0.3))
    assert found.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_idle(shop, shop_server)


async def until_idle(shop: Stubs, running: Running) -> None:
    """Returns once the engine runs nothing; its next step, not a clock, is what is waited for."""
    async with asyncio.timeout(120):
        while True:
            status = await shop.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=running.admin)
            if status.engine_status.num_running == status.engine_status.num_waiting == 0:
                return


async def test_a_repeated_request_id_gets_the_first_answer_however_it_is_asked(
    shop: Stubs, shop_server: Running
) -> None:
    request = ask("hi", temperature=1.0, request_id="repeat-1", logprobs=True)
    first = await shop.agent.Generate(request, metadata=shop_server.user)
    assert await shop.agent.Generate(request, metadata=shop_server.user) == first
    events = await events_of(shop.agent.StreamGenerate(request, metadata=shop_server.user))
    assert events[0].started.response_id == first.response_id
    assert [event.finished for event in events if event.HasField("finished")] == list(first.answers)
    assert events[-1].usage == first.usage
    # The id is the caller's own: another one's is another request.
    other = await shop.agent.Generate(request, metadata=shop_server.other_user)
    assert other.response_id != first.response_id


async def test_a_request_id_for_something_else_is_refused(shop: Stubs, shop_server: Running) -> None:
    await shop.agent.Generate(ask("hi", request_id="repeat-2"), metadata=shop_server.user)
    found = await failure(shop.agent.Generate(ask("ho", request_id="repeat-2"), metadata=shop_server.user))
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")


async def test_repeats_at_once_share_one_execution(shop: Stubs, shop_server: Running) -> None:
    request = ask("hi", temperature=1.0, request_id="repeat-3", max_tokens=64, ignore_eos=True)
    replies = await asyncio.gather(
        *(shop.agent.Generate(request, metadata=shop_server.user) for _ in range(4)),
    )
    assert len({reply.response_id for reply in replies}) == 1
    assert len({reply.answers[0].text for reply in replies}) == 1


async def test_a_repeat_goes_on_where_the_first_was_cancelled(shop: Stubs, shop_server: Running) -> None:
    request = ask("hi", request_id="repeat-4", max_tokens=200, ignore_eos=True)
    first = shop.agent.StreamGenerate(request, metadata=shop_server.user)
    await first.read()
    second = asyncio.ensure_future(events_of(shop.agent.StreamGenerate(request, metadata=shop_server.user)))
    await first.read()
    first.cancel()
    events = await second
    assert events[-1].usage.completion_tokens == 200


async def test_feedback_is_for_ones_own_answers_and_happens_once(shop: Stubs, shop_server: Running) -> None:
    reply = await shop.agent.Generate(ask("hi"), metadata=shop_server.user)
    feedback = agent_pb2.RecordFeedbackRequest(response_id=reply.response_id, good=True, request_id="feedback-1")
    first = await shop.agent.RecordFeedback(feedback, metadata=shop_server.user)
    assert await shop.agent.RecordFeedback(feedback, metadata=shop_server.user) == first
    found = await failure(shop.agent.RecordFeedback(feedback, metadata=shop_server.other_user))
    assert (found.code, found.resource) == (grpc.StatusCode.NOT_FOUND, reply.response_id)
    score = agent_pb2.RecordFeedbackRequest(response_id=reply.response_id, score=1.5)
    assert (await failure(shop.agent.RecordFeedback(score, metadata=shop_server.user))).field == "score"
    empty = agent_pb2.RecordFeedbackRequest(response_id=reply.response_id)
    assert (await failure(shop.agent.RecordFeedback(empty, metadata=shop_server.user))).field == "value"
    unknown = agent_pb2.RecordFeedbackRequest(response_id="resp_0", good=False)
    assert (await failure(shop.agent.RecordFeedback(unknown, metadata=shop_server.admin))).resource == "resp_0"


async def test_no_log_keeps_who_and_how_much_but_nothing_that_was_said(shop: Stubs, shop_server: Running) -> None:
    request = ask("a secret", learning_policy=content_pb2.NO_LOG, request_id="secret-1", session_id="secret")
    reply = await shop.agent.Generate(request, metadata=shop_server.user)
    await shop.agent.RecordFeedback(
        agent_pb2.RecordFeedbackRequest(response_id=reply.response_id, good=True), metadata=shop_server.user
    )
    store = shop_server.runtime.store
    row = store.query("SELECT * FROM requests WHERE id = ?", (reply.response_id,))[0]
    assert (row["caller"], row["adapter"], row["completion_tokens"]) == ("alice", "base", reply.usage.completion_tokens)
    assert (row["response"], row["request_id"]) == (None, None)
    assert store.query("SELECT * FROM messages WHERE response_id = ?", (reply.response_id,)) == []


async def test_what_was_logged_tells_the_callers_turns_from_the_models(shop: Stubs, shop_server: Running) -> None:
    reply = await shop.agent.Generate(ask("hi", request_id="logged-1"), metadata=shop_server.user)
    rows = shop_server.runtime.store.query(
        "SELECT role, sampled FROM messages WHERE response_id = ? ORDER BY position", (reply.response_id,)
    )
    assert [(row["role"], row["sampled"]) for row in rows] == [("user", 0), ("assistant", 1)]


async def test_a_cut_off_answer_is_logged_as_far_as_it_went_and_a_mistake_is_not(
    shop: Stubs, shop_server: Running
) -> None:
    stream = shop.agent.StreamGenerate(ask("hi", max_tokens=1900, ignore_eos=True), metadata=shop_server.user)
    cut = (await stream.read()).started.response_id
    await stream.read()
    stream.cancel()
    refused = shop.agent.StreamGenerate(ask("hi", max_tokens=100_000), metadata=shop_server.user)
    mistaken = (await refused.read()).started.response_id
    await failure(events_of_rest(refused))
    await until_idle(shop, shop_server)
    # Whatever is written durably comes after what was queued before it.
    await shop.agent.Generate(ask("hi", request_id="after-cut"), metadata=shop_server.user)
    query = shop_server.runtime.store.query
    rows = query("SELECT status, completion_tokens FROM requests WHERE id = ?", (cut,))
    assert [row["status"] for row in rows] == ["CANCELLED"]
    assert 0 < rows[0]["completion_tokens"] < 1900
    assert query("SELECT 1 FROM requests WHERE id = ?", (mistaken,)) == []


async def events_of_rest(stream: grpc.aio.UnaryStreamCall) -> None:
    """Reads a stream whose first event was read to its end."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_models_are_the_base_and_what_may_be_pinned(shop: Stubs, shop_server: Running) -> None:
    models = (await shop.agent.ListModels(agent_pb2.ListModelsRequest(), metadata=shop_server.user)).models
    assert models[0].name == "base"
    assert models[0].accepts_images
    assert models[0].context_length == 2048
    bad = agent_pb2.ListModelsRequest(page_token="bm90IG91cnM=")
    assert (await failure(shop.agent.ListModels(bad, metadata=shop_server.user))).field == "page_token"
    many = agent_pb2.ListModelsRequest(page_size=501)
    assert (await failure(shop.agent.ListModels(many, metadata=shop_server.user))).field == "page_size"


async def test_a_given_answer_is_scored_as_it_would_be_sampled(shop: Stubs, shop_server: Running) -> None:
    sampled = await shop.agent.Generate(ask("hello", logprobs=True, temperature=0.0), metadata=shop_server.user)
    answer = sampled.answers[0]
    request = agent_pb2.ScoreRequest(messages=ask("hello").messages, continuation=answer.text)
    scored = await shop.agent.Score(request, metadata=shop_server.user)
    assert scored.adapter == "base"
    assert scored.num_prompt_tokens == sampled.usage.prompt_tokens
    assert list(scored.tokens.ids) == list(answer.tokens.ids)[: len(scored.tokens.ids)]
    expected = list(answer.tokens.logprobs)[: len(scored.tokens.ids)]
    assert list(scored.tokens.logprobs) == pytest.approx(expected, abs=2e-3)


async def test_scoring_refuses_what_cannot_be_scored(shop: Stubs, shop_server: Running) -> None:
    messages = ask("hello").messages
    empty = await failure(shop.agent.Score(agent_pb2.ScoreRequest(messages=messages), metadata=shop_server.user))
    assert empty.field == "continuation"
    unknown = agent_pb2.ScoreRequest(messages=messages, continuation="yes", adapter="9-nobody")
    assert (await failure(shop.agent.Score(unknown, metadata=shop_server.user))).code is grpc.StatusCode.NOT_FOUND
    practice = agent_pb2.ScoreRequest(messages=messages, continuation="yes", priority=content_pb2.PRACTICE)
    refused = await failure(shop.agent.Score(practice, metadata=shop_server.user))
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
