"""How model families write tool calls: read alike, bounded, with a hint in their own form; live over the wire."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from nightschool_proto.v1 import agent_pb2, content_pb2
from nightschool_server.agent.call_forms import FORMS, HERMES, CallForm, form_of_template, strict_fault
from nightschool_server.agent.formats import ToolCallFormat
from nightschool_server.call_form_choice import check_installed, with_call_form
from nightschool_server.chat import ToolSpec
from nightschool_server.config.config import Config
from nightschool_server.engine import GenerateRequest
from nightschool_server.engines.model_folder import read_model_folder
from nightschool_server.engines.text_stream import TextStream
from nightschool_server.errors import AppError, ConfigError
from nightschool_server.main import main

from tests.harness import SHOP_MODEL, failure, server_thread
from tests.server.scripted_engine import ScriptedEngine

SCHEMA = '{"type":"object","properties":{"item":{"type":"string"},"n":{"type":"integer"}}}'
TOOLS = (ToolSpec("price", "The price.", SCHEMA),)
MISTRAL = FORMS["mistral"]
BROKEN = {
    "llama3_json": '{"name": "add", ',
    "mistral": "[TOOL_CALLS]?",
    "pythonic": "[add(",
    "qwen3_coder": "<tool_call>",
}
# As Mistral's templates do: turns must alternate unless they hold calls, results need ids of nine characters.
MISTRAL_TEMPLATE = """\
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for tool in tools or [] %}[AVAILABLE_TOOLS]{{ tool | tojson }}{% endfor -%}
{%- set ns = namespace(index=0) -%}
{%- for m in messages if m.role != 'system' -%}
{%- if not (m.role == 'tool' or m.tool_calls is defined) -%}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{%- set ns.index = ns.index + 1 -%}
{%- endif -%}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('ids of 9') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls is defined %}[TOOL_CALLS]
{%- for call in m.tool_calls %}{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}
{%- else %}{{ m.content }}{% endif -%}
{%- endfor -%}"""


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_what_a_family_writes_is_read_back(form: CallForm) -> None:
    parsed = form.read(form.write("price", {"item": 'the "mug"; a lamp', "n": 2}), TOOLS)
    assert parsed.error is None
    assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] == [
        ("price", {"item": 'the "mug"; a lamp', "n": 2})
    ]


@pytest.mark.parametrize(
    ("name", "answer", "text", "calls"),
    [
        ("llama3_json", '{"name": "a", "parameters": {"x": 1}}; {"name": "b", "arguments": {}}', "", ["a", "b"]),
        ("llama3_json", '<|python_tag|>{"name": "a", "parameters": {}}', "", ["a"]),
        ("llama3_json", '{"price": 3}', '{"price": 3}', []),
        ("llama3_json", "It costs 3.", "It costs 3.", []),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": "b"}]', "", ["a", "b"]),
        ("mistral", 'I look.[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b{}', "I look.", ["a", "b"]),
        ("mistral", "[TOOL_CALLS]a[CALL_ID]123456789[ARGS]{}", "", ["a"]),
        ("mistral", "It costs 3.", "It costs 3.", []),
        ("pythonic", "[a(x=1), b(y=['z'])]", "", ["a", "b"]),
        ("pythonic", "[1, 2] are the numbers", "[1, 2] are the numbers", []),
        ("qwen3_coder", "I look.\n<tool_call>\n<function=a>\n</function>\n</tool_call>", "I look.", ["a"]),
        ("qwen3_coder", "It costs 3.", "It costs 3.", []),
    ],
)
def test_the_ways_of_a_family_are_read(name: str, answer: str, text: str, calls: list[str]) -> None:
    parsed = FORMS[name].read(answer, ())
    assert (parsed.error, parsed.text, [call.name for call in parsed.calls]) == (None, text, calls)
    assert len({call.id for call in parsed.calls}) == len(calls)


@pytest.mark.parametrize(
    ("name", "answer", "told"),
    [
        ("llama3_json", '{"name": "a", "parameters": {"x"', "tool call is not JSON"),
        ("llama3_json", '{"name": "a", "parameters": {}} and so on', "tool call is not JSON"),
        ("llama3_json", '{"name": "a", "parameters": [1]}', '"arguments" of a tool call must be an object'),
        ("mistral", "[TOOL_CALLS]what?", "must be followed by a list of calls"),
        ("mistral", "[TOOL_CALLS] [3]", 'must be an object with "name"'),
        ("mistral", "[TOOL_CALLS]a{} so", "goes on behind its JSON"),
        ("pythonic", "[a(x=", "are not a Python list"),
        ("pythonic", "[a(1)]", "arguments by name"),
        ("pythonic", "[a(x=__import__('os').getcwd())]", "argument 'x' of a tool call is not a literal"),
        ("pythonic", "[a(x=b'1')]", "no JSON value"),
        ("pythonic", f"[a(x={'[' * 500}", "are not a Python list"),
        ("qwen3_coder", "<tool_call><function=a>", "must hold <function=NAME>"),
        ("qwen3_coder", '<tool_call>{"name": "a"}</tool_call>', "must hold <function=NAME>"),
        ("qwen3_coder", "<function=a></function>", "without <tool_call>"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_hint_of_the_family(name: str, answer: str, told: str) -> None:
    parsed = FORMS[name].read(answer, ())
    assert parsed.calls == ()
    assert told in (parsed.error or "")
    assert ToolCallFormat(form=FORMS[name]).hint == FORMS[name].hint != HERMES.hint


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_no_answer_makes_a_reader_raise_or_write_what_is_no_text(form: CallForm) -> None:
    rng = random.Random(7)
    pieces = [
        "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<function=a>", "</function>", "<parameter=x>", "</parameter>",
        '{"name": "a", ', '"parameters": {', '"arguments": {', "}", "]", "[", "a(", "x=", ")", "1e999", "\\ud800", '"',
        "[ARGS]", ";", "\n", "\ud800", "NaN", "\0", "<|python_tag|>", "{" * 90, "b", "text",
    ]  # fmt: skip
    answers = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(1500)]
    for answer in [*answers, form.write("a", {}) * 3, "[a(" + "(" * 3000, "x" * 1_000_001]:
        for call in form.read(answer, TOOLS).calls:
            assert isinstance(json.loads(call.arguments), dict)
            call.arguments.encode()


def test_the_template_says_which_form(tmp_path: Path) -> None:
    assert with_call_form(Config()).agent.tool_call_format == "hermes"
    assert form_of_template("{{ tools }}") is HERMES
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "... <|python_tag|> ..."}))
    named = Config.model_validate({"engine": {"model": str(tmp_path)}})
    assert with_call_form(named).agent.tool_call_format == "llama3_json"
    (tmp_path / "chat_template.jinja").write_text(MISTRAL_TEMPLATE)
    assert with_call_form(named).agent.tool_call_format == "mistral"
    chosen = Config.model_validate({"engine": {"model": str(tmp_path)}, "agent": {"tool_call_format": "pythonic"}})
    assert with_call_form(chosen).agent.tool_call_format == "pythonic"
    assert (
        with_call_form(Config.model_validate({"engine": {"model": str(SHOP_MODEL)}})).agent.tool_call_format == "hermes"
    )


def test_a_form_whose_reader_is_not_installed_is_refused_at_the_start() -> None:
    check_installed(FORMS["qwen3_coder"])
    missing = replace(FORMS["qwen3_coder"], needs="transformers.no_such_parsing")
    with pytest.raises(
        ConfigError, match=r"transformers\.no_such_parsing reads, and transformers 5.* has none: pip install"
    ):
        check_installed(missing)


def test_special_tokens_are_in_the_text_where_they_are_asked_for() -> None:
    folder = read_model_folder(str(SHOP_MODEL), context_length=0, max_lora_rank=8, with_digest=False)
    tokenizer = folder.tokenizer
    (special,) = tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]
    ids = [*tokenizer("a mug", add_special_tokens=False)["input_ids"], special, max(folder.eos_ids)]

    def text(shown_without: frozenset[int] | None) -> str:
        stream = TextStream(tokenizer.backend_tokenizer, (), shown_without)
        return "".join(stream.push(token)[0] for token in ids) + stream.finish()[0]

    assert text(None) == "a mug"
    assert text(folder.eos_ids) == "a mug<|im_start|>"


def test_strict_tools_are_refused_where_calls_cannot_be_guided(tmp_path: Path) -> None:
    strict = (ToolSpec("price", "The price.", SCHEMA, strict=True),)
    assert strict_fault(HERMES, strict) is None
    assert strict_fault(MISTRAL, TOOLS) is None
    assert "tool 'price' is strict, but calls are written as mistral" in (strict_fault(MISTRAL, strict) or "")
    settings = {"agent.app": "tests.server.strict_app:app", "agent.tool_call_format": "mistral"}
    with pytest.raises(AppError, match="only calls as hermes can be guided"), server_thread(tmp_path, settings):
        pass


@pytest.mark.parametrize("name", ["llama3_json", "mistral", "pythonic", "qwen3_coder"])
async def test_a_task_runs_in_the_form_of_the_model(name: str, tmp_path: Path) -> None:
    form, requests = FORMS[name], []

    def script(request: GenerateRequest) -> str:
        requests.append(request)
        return [BROKEN[name], form.write("add", {"a": 2, "b": 3}), "It is 5."][min(len(requests) - 1, 2)]

    async def start() -> ScriptedEngine:
        return ScriptedEngine(script)

    settings = {"agent.app": "tests.server.tools_app:app", "agent.tool_call_format": name}
    with server_thread(tmp_path, settings, start) as server:
        async with server.stubs() as wire:
            stream = wire.agent.RunTask(metadata=server.user)
            ask = content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text="2 + 3?")])
            await stream.write(agent_pb2.RunTaskRequest(start=agent_pb2.TaskStart(messages=[ask])))
            events = [event async for event in stream]
            asked = list(requests)
            del requests[1:]
            called = await wire.agent.Generate(agent_pb2.GenerateRequest(messages=[ask]), metadata=server.user)
            add = content_pb2.Tool(name="add", parameters_json=SCHEMA, strict=True)
            refused = await failure(
                wire.agent.Generate(agent_pb2.GenerateRequest(messages=[ask], tools=[add]), metadata=server.user)
            )
    assert events[-1].finished.answer == "It is 5."
    results = [event.tool_result for event in events if event.HasField("tool_result")]
    assert [(result.name, result.content) for result in results] == [("add", "5")]
    told = [part for message in events[-1].finished.messages for part in message.parts]
    assert any(form.hint in (part.text or part.tool_result.content) for part in told)
    assert {request.sampling.special_tokens for request in [*asked, *requests]} == {form.special_tokens}
    assert [call.name for call in called.answers[0].tool_calls] == ["add"]
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "tools")


def test_a_conversation_in_mistrals_form_goes_through_a_template_that_counts_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHOP_MODEL, model)
    (model / "chat_template.jinja").write_text(MISTRAL_TEMPLATE)
    command = ["check", "tests.server.tools_app:app", "--home", str(tmp_path / "home"), "--model", str(model)]
    main(command)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = {line[1 if line[0] == "template" else 0]: line for line in lines}
    assert "mistral" in states["form"]
    assert [states[name][1 if name != "form" else 2] for name in ("calls", "results")] == ["yes", "yes"]
    main([*command, "--set", "agent.tool_call_format=hermes"])
    assert (
        "agent.tool_call_format is hermes, but the template writes mistral: set it to auto" in capsys.readouterr().out
    )
