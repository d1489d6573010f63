"""Requests off the wire: every rule has its field, its value and its remedy; what is fine arrives unchanged."""

from __future__ import annotations

import hashlib
import io
import json

import PIL.Image
import pytest
from nightschool_proto.v1 import agent_pb2, content_pb2
from nightschool_server import chat, engine
from nightschool_server.errors import InvalidRequestError
from nightschool_server.service import wire, wire_replies

USER, ASSISTANT, TOOL, SYSTEM = (
    content_pb2.Message.USER,
    content_pb2.Message.ASSISTANT,
    content_pb2.Message.TOOL,
    content_pb2.Message.SYSTEM,
)
NAN = float("nan")
TASK = engine.Sampling(max_tokens=64, temperature=0.0)


def png(width: int = 4, height: int = 3, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def message(*parts: content_pb2.Part, role: content_pb2.Message.Role.ValueType = USER) -> content_pb2.Message:
    return content_pb2.Message(role=role, parts=parts)


def text(value: str = "hello") -> content_pb2.Part:
    return content_pb2.Part(text=value)


def image(**source: object) -> content_pb2.Part:
    return content_pb2.Part(image=content_pb2.Image(**source))


def call(name: str = "price", arguments: str = '{"item": "mug"}') -> content_pb2.Part:
    return content_pb2.Part(tool_call=content_pb2.ToolCall(id="call_0", name=name, arguments_json=arguments))


def tool(name: str = "price", schema: str = '{"type": "object"}', *, strict: bool = False) -> content_pb2.Tool:
    return content_pb2.Tool(name=name, description="what it costs", parameters_json=schema, strict=strict)


def request(**fields: object) -> agent_pb2.GenerateRequest:
    fields.setdefault("messages", [message(text())])
    return agent_pb2.GenerateRequest(**fields)


def sampling(**fields: object) -> agent_pb2.GenerateRequest:
    return request(sampling=content_pb2.Sampling(**fields))


BAD = {
    "no messages": (agent_pb2.GenerateRequest(), "messages", "at least one"),
    "no role": (request(messages=[message(text(), role=0)]), "messages[0].role", "USER"),
    "unknown role": (request(messages=[message(text(), role=9)]), "messages[0].role", "9"),
    "no parts": (request(messages=[message()]), "messages[0].parts", "at least one"),
    "empty part": (request(messages=[message(content_pb2.Part())]), "messages[0].parts[0]", "set one of"),
    "empty image": (request(messages=[message(text(), image())]), "messages[0].parts[1].image", "bytes"),
    "image bytes that are none": (
        request(messages=[message(text()), message(image(data=b"not an image"))]),
        "messages[1].parts[0].image.data",
        "PNG",
    ),
    "truncated image": (request(messages=[message(image(data=png()[:40]))]), "messages[0].parts[0].image.data", "PNG"),
    "huge image": (request(messages=[message(image(data=png(9000, 9000)))]), "messages[0].parts[0].image.data", "9000"),
    "seventeen images": (
        request(messages=[message(*(image(sha256=f"{i:064x}") for i in range(17)))]),
        "messages[0].parts[16].image",
        "log.max_images_per_request",
    ),
    "arguments nested too deeply": (
        request(messages=[message(call(arguments="[" * 100_000), role=ASSISTANT)]),
        "messages[0].parts[0].tool_call.arguments_json",
        "JSON",
    ),
    "bad sha256": (request(messages=[message(image(sha256="abc"))]), "messages[0].parts[0].image.sha256", "'abc'"),
    "image of the assistant": (
        request(messages=[message(image(data=png()), role=ASSISTANT)]),
        "messages[0].parts[0].image",
        "assistant",
    ),
    "tool call of the user": (request(messages=[message(call())]), "messages[0].parts[0].tool_call", "user"),
    "text of a tool": (request(messages=[message(text(), role=TOOL)]), "messages[0].parts[0].text", "tool_result"),
    "call twice": (
        request(messages=[message(text("<tool_call>\n{}\n</tool_call>"), call(), role=ASSISTANT)]),
        "messages[0].parts",
        "twice",
    ),
    "call without a name": (
        request(messages=[message(call(name=""), role=ASSISTANT)]),
        "messages[0].parts[0].tool_call.name",
        "name",
    ),
    "arguments not JSON": (
        request(messages=[message(call(arguments="{"), role=ASSISTANT)]),
        "messages[0].parts[0].tool_call.arguments_json",
        "JSON",
    ),
    "arguments a list": (
        request(messages=[message(call(arguments="[]"), role=ASSISTANT)]),
        "messages[0].parts[0].tool_call.arguments_json",
        "object",
    ),
    "result without a name": (
        request(messages=[message(content_pb2.Part(tool_result=content_pb2.ToolResult(content="3")), role=TOOL)]),
        "messages[0].parts[0].tool_result.name",
        "name",
    ),
    "tool without a name": (request(tools=[tool(name=" ")]), "tools[0].name", "name"),
    "two tools of one name": (request(tools=[tool(), tool()]), "tools[1].name", "'price'"),
    "schema not JSON": (request(tools=[tool(schema="{'a'}")]), "tools[0].parameters_json", "not JSON"),
    "schema with NaN": (
        request(tools=[tool(schema='{"type": "object", "x": NaN}')]),
        "tools[0].parameters_json",
        "NaN",
    ),
    "strict and not to be guided": (
        request(tools=[tool(), tool("b", '{"type": "object", "properties": {"a": {"not": {}}}}', strict=True)]),
        "tools[1].strict",
        "the schema of strict tool 'b' cannot be guided (Unimplemented keys: [\"not\"]): simplify it, or drop strict",
    ),
    "unknown tool choice": (request(tool_choice=7), "tool_choice", "REQUIRED"),  # type: ignore[arg-type]
    "a call required of no tool": (request(tool_choice=content_pb2.REQUIRED), "tool_choice", "no tools"),
    "schema not an object": (request(tools=[tool(schema='{"type": "array"}')]), "tools[0].parameters_json", "object"),
    "schema that is none": (
        request(tools=[tool(), tool("b", '{"type": "object", "properties": {"a": {"type": "nubmer"}}}')]),
        "tools[1].parameters_json",
        "properties/a/type",
    ),
    "schema too long": (
        request(tools=[tool(schema=json.dumps({"type": "object", "title": "x" * 70_000}))]),
        "tools[0].parameters_json",
        "65536",
    ),
    "negative max_tokens": (sampling(max_tokens=-1), "sampling.max_tokens", "-1"),
    "zero max_tokens": (sampling(max_tokens=0), "sampling.max_tokens", "at least 1"),
    "negative temperature": (sampling(temperature=-0.1), "sampling.temperature", "-0.1"),
    "high temperature": (sampling(temperature=5.1), "sampling.temperature", "5.1"),
    "temperature NaN": (sampling(temperature=NAN), "sampling.temperature", "nan"),
    "zero top_p": (sampling(top_p=0), "sampling.top_p", "above 0"),
    "high top_p": (sampling(top_p=1.5), "sampling.top_p", "1.5"),
    "top_p NaN": (sampling(top_p=NAN), "sampling.top_p", "nan"),
    "negative top_k": (sampling(top_k=-1), "sampling.top_k", "-1"),
    "negative seed": (sampling(seed=-1), "sampling.seed", "-1"),
    "huge seed": (sampling(seed=2**63 - 1), "sampling.seed", "9223372036854775807"),
    "no answers": (sampling(n=0), "sampling.n", "64"),
    "too many answers": (sampling(n=65), "sampling.n", "65"),
    "nine stop strings": (sampling(stop=["a"] * 9), "sampling.stop", "8"),
    "empty stop string": (sampling(stop=["a", ""]), "sampling.stop[1]", "leave it out"),
    "top_logprobs out of range": (sampling(logprobs=True, top_logprobs=21), "sampling.top_logprobs", "20"),
    "top_logprobs alone": (sampling(top_logprobs=2), "sampling.top_logprobs", "sampling.logprobs"),
    "unknown policy": (request(learning_policy=9), "learning_policy", "TRAIN"),
    "unknown priority": (request(priority=7), "priority", "PRACTICE"),
    "long session id": (request(session_id="s" * 201), "session_id", "200"),
    "unprintable request id": (request(request_id="a\nb"), "request_id", "printable"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_rule_names_field_value_and_remedy(name: str) -> None:
    bad, field, says = BAD[name]
    with pytest.raises(InvalidRequestError) as caught:
        wire.generate_call(bad)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
    assert says in str(caught.value)


def test_a_task_start_is_checked_like_a_request() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        wire.task_call(agent_pb2.TaskStart(messages=[message(text())], client_tools=[tool(), tool()]), TASK)
    assert caught.value.field == "start.client_tools[1].name"
    with pytest.raises(InvalidRequestError) as caught:
        wire.task_call(agent_pb2.TaskStart(messages=[message(text())], max_steps=-2), TASK)
    assert caught.value.field == "start.max_steps"
    two = content_pb2.Sampling(n=2)
    with pytest.raises(InvalidRequestError) as caught:
        wire.task_call(agent_pb2.TaskStart(messages=[message(text())], sampling=two), TASK)
    assert caught.value.field == "start.sampling.n"
    assert str(caught.value).startswith("start.sampling.n is 2")


def test_a_task_takes_its_own_defaults_where_a_field_is_absent() -> None:
    start = agent_pb2.TaskStart(messages=[message(text())], sampling=content_pb2.Sampling(top_p=0.5))
    assert wire.task_call(start, TASK).sampling == engine.Sampling(max_tokens=64, temperature=0.0, top_p=0.5)


def test_a_full_request_arrives_unchanged() -> None:
    data = png()
    sha256 = hashlib.sha256(data).hexdigest()
    got = wire.generate_call(
        request(
            messages=[
                message(text("be brief"), role=SYSTEM),
                message(image(data=data), text("what is it?"), image(sha256="0" * 64)),
                message(text("let me see"), call(), role=ASSISTANT),
                message(
                    content_pb2.Part(tool_result=content_pb2.ToolResult(call_id="call_0", name="price", content="3")),
                    role=TOOL,
                ),
            ],
            tools=[
                tool(schema='{"type": "object", "properties": {"item": {"type": "string"}}}', strict=True),
                tool("b"),
            ],
            tool_choice=content_pb2.REQUIRED,
            sampling=content_pb2.Sampling(max_tokens=7, temperature=0.7, top_p=0.9, top_k=3, seed=11, n=2, stop=["."]),
            adapter="3-00ff00ff",
            session_id="s1",
            request_id="r1",
            learning_policy=content_pb2.NO_LOG,
            priority=content_pb2.PRACTICE,
        )
    )
    assert got.messages == (
        chat.system("be brief"),
        chat.Message("user", (chat.Image(sha256), chat.Text("what is it?"), chat.Image("0" * 64))),
        chat.Message("assistant", (chat.Text("let me see"), chat.ToolCall("call_0", "price", '{"item": "mug"}'))),
        chat.Message("tool", (chat.ToolResult("call_0", "price", "3"),)),
    )
    assert got.images.sent[sha256].data == data
    assert got.images.sent[sha256].media_type == "image/png"
    assert got.images.fields == {
        sha256: "messages[1].parts[0].image",
        "0" * 64: "messages[1].parts[2].image",
    }
    assert got.sampling == engine.Sampling(max_tokens=7, temperature=0.7, top_p=0.9, top_k=3, seed=11, n=2, stop=(".",))
    assert got.tools[0].parameters == '{"properties":{"item":{"type":"string"}},"type":"object"}'
    assert ([tool.strict for tool in got.tools], got.tool_choice) == ([True, False], "required")
    assert (got.adapter, got.session_id, got.request_id, got.policy) == ("3-00ff00ff", "s1", "r1", "no_log")
    assert got.priority == engine.PRACTICE_PRIORITY


def test_absent_fields_take_the_defaults() -> None:
    got = wire.generate_call(request())
    assert got.sampling == engine.Sampling()
    assert got.policy is None
    assert got.priority == engine.LIVE_PRIORITY


def test_the_digest_covers_everything_but_the_request_id() -> None:
    plain = wire.generate_call(request())
    assert wire.generate_call(request(request_id="r1")).digest == plain.digest
    assert wire.generate_call(request(adapter="base")).digest != plain.digest
    assert wire.generate_call(sampling(seed=1)).digest != plain.digest


def test_messages_survive_the_way_out_and_back() -> None:
    messages = (
        chat.system("be brief"),
        chat.user("what?", ["a" * 64]),
        chat.Message("assistant", (chat.ToolCall("call_0", "price", "{}"),)),
        chat.Message("tool", (chat.ToolResult("call_0", "price", "no such item", is_error=True),)),
        # What the agent loop answers to a call that it cannot read.
        chat.Message("tool", (chat.ToolResult("call_0", "", "error: not JSON", is_error=True),)),
    )
    back = wire.generate_call(agent_pb2.GenerateRequest(messages=wire_replies.messages_to_proto(messages)))
    assert back.messages == messages


def test_deltas_of_one_wake_up_join_by_answer_and_keep_every_token() -> None:
    deltas = [
        engine.Delta(0, "a", (1,), (-0.5,)),
        engine.Delta(1, "x", (7,), (-0.1,)),
        engine.Delta(0, "b", (2, 3), (-0.25, -1.0)),
        engine.Delta(2, "", ()),
    ]
    joined = wire_replies.merged_deltas(deltas, logprobs=True)
    assert [(d.index, d.text, list(d.tokens.ids)) for d in joined] == [(0, "ab", [1, 2, 3]), (1, "x", [7])]
    assert list(joined[0].tokens.logprobs) == [-0.5, -0.25, -1.0]
    assert not wire_replies.merged_deltas(deltas, logprobs=False)[0].HasField("tokens")


def test_an_answer_with_a_tool_call_ends_with_tool_calls_and_keeps_its_text() -> None:
    markup = 'Let me look.\n<tool_call>\n{"name": "price", "arguments": {"item": "mug"}}\n</tool_call>'
    so_far = wire_replies.AnswersSoFar(n=1, logprobs=False)
    answer = so_far.add(engine.Delta(0, markup, (1, 2), finish_reason="stop", num_prompt_tokens=9))
    got = so_far.finished(answer)
    assert got.text == markup
    assert got.finish_reason == content_pb2.TOOL_CALLS
    assert [(c.name, json.loads(c.arguments_json)) for c in got.tool_calls] == [("price", {"item": "mug"})]
    assert so_far.usage() == content_pb2.Usage(prompt_tokens=9, completion_tokens=2)


def test_an_answer_cut_off_inside_a_tool_call_says_why_it_has_none() -> None:
    so_far = wire_replies.AnswersSoFar(n=1, logprobs=False)
    got = so_far.finished(so_far.add(engine.Delta(0, '<tool_call>\n{"na', (1,), finish_reason="length")))
    assert got.finish_reason == content_pb2.LENGTH
    assert "without" in got.tool_call_error
