"""The grammar of guided answers: what it lets through and what not, however a tokenizer writes the marks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from nightschool_server.agent.toolcalls import CLOSE, OPEN, parse_answer, write_call
from nightschool_server.chat import ToolSpec
from nightschool_server.engine import Prompt
from nightschool_server.engines.guidance import is_guided, strict_fault
from nightschool_server.engines.matching import Guide, Matcher, hold
from nightschool_server.errors import InvalidRequestError

from tests.server.guided_tools import ASK, ORDER, PRICE, prompt_of, spec
from tests.server.tiny_models import make_tokenizer

PRICED = write_call("price", {"item": "mug"})
ASKED = write_call("ask", {"anything": [1, {"deep": None}]})


@pytest.fixture(scope="module", params=[False, True], ids=["spelled", "one token"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(call_marks=request.param)


def guide_of(tokenizer: Any, *more_ends: int) -> Guide:
    return Guide(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id, *more_ends}))


def allowed(tokenizer: Any, matcher: Matcher) -> set[int]:
    logits = torch.zeros(1, len(tokenizer))
    hold(logits, {0: matcher})
    return set(logits[0].isfinite().nonzero()[:, 0].tolist())


def follow(tokenizer: Any, prompt: Prompt, text: str) -> tuple[str, bool]:
    """How much of `text` the grammar lets through, and whether the answer may end there."""
    matcher = guide_of(tokenizer).compiled(prompt).matcher()
    taken: list[int] = []
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token_id not in allowed(tokenizer, matcher):
            break
        matcher.accept(token_id)
        taken.append(token_id)
    return tokenizer.decode(taken), tokenizer.eos_token_id in allowed(tokenizer, matcher)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Three apples, ünïcode 日本 and\nlines { } <tool",
        PRICED,
        f"First I look.\n{PRICED}\n{PRICED} and {ASKED}, done",
        write_call("ask", {}),
    ],
)
def test_free_text_and_calls_pass_whole(tokenizer: Any, text: str) -> None:
    assert follow(tokenizer, prompt_of(PRICE, ASK, tool_choice="auto"), text) == (text, True)
    assert parse_answer(text).error is None


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (f'{OPEN}{{"name"', OPEN),
        (f'a {OPEN}\n{{"name": "cost"', f'a {OPEN}\n{{"name": "'),
        (f'{OPEN}\n{{"name": "price", "arguments": {{}}', f'{OPEN}\n{{"name": "price", "arguments": {{'),
        (write_call("price", {"item": "cup"}), f'{OPEN}\n{{"name": "price", "arguments": {{"item": "'),
        (f"{PRICED[:-12]} {CLOSE}", PRICED[:-13]),
        (f'{OPEN}\n{{"name": "ask", "arguments": []', f'{OPEN}\n{{"name": "ask", "arguments": '),
    ],
)
def test_a_call_that_breaks_a_rule_is_cut_at_the_rule(tokenizer: Any, text: str, passes: str) -> None:
    got, may_end = follow(tokenizer, prompt_of(PRICE, ASK, tool_choice="auto"), text)
    assert text.startswith(got)
    assert got.startswith(passes)
    assert len(got) < len(text)
    assert not may_end


def test_a_mark_that_is_a_token_may_be_spelled_out_too() -> None:
    tokenizer = make_tokenizer(call_marks=True)
    matcher = guide_of(tokenizer).compiled(prompt_of(PRICE, tool_choice="auto")).matcher()
    pieces = ["<", "tool_call>", "\n{", '"name": "price", "arguments": {"item": "lamp"}}\n<', "/tool_call>"]
    for token_id in (i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]):
        assert token_id in allowed(tokenizer, matcher)
        matcher.accept(token_id)
    spelled = guide_of(tokenizer).compiled(prompt_of(PRICE, tool_choice="auto")).matcher()
    for token_id in (i for piece in pieces[:2] for i in tokenizer(piece, add_special_tokens=False)["input_ids"]):
        spelled.accept(token_id)
    assert {tokenizer.decode([i])[0] for i in allowed(tokenizer, spelled)} == {"\n"}


def test_a_required_call_comes_first_and_nothing_but_calls_follows(tokenizer: Any) -> None:
    prompt = prompt_of(PRICE, ASK)
    assert follow(tokenizer, prompt, "") == ("", False)
    assert follow(tokenizer, prompt, "Text") == ("", False)
    assert follow(tokenizer, prompt, f"{PRICED}\n{ASKED}") == (f"{PRICED}\n{ASKED}", True)
    assert follow(tokenizer, prompt, f"{PRICED} then")[0] == PRICED
    # A required call of a tool that is not strict is still a call of an offered tool.
    assert follow(tokenizer, prompt_of(ASK), ASKED) == (ASKED, True)


def test_text_tokens_and_every_end_token_pass_and_special_ones_do_not() -> None:
    tokenizer = make_tokenizer(call_marks=True)
    ids = tokenizer.convert_tokens_to_ids
    free = guide_of(tokenizer, ids("<|endoftext|>")).compiled(prompt_of(PRICE, tool_choice="auto")).matcher()
    now = allowed(tokenizer, free)
    assert {ids(t) for t in ("<think>", "</think>", OPEN, "<|im_end|>", "<|endoftext|>")} <= now
    assert not {ids(t) for t in ("<|im_start|>", "<image>", CLOSE)} & now
    thought, mark = f"<think>so</think>{OPEN}", f"<think>so</think>{OPEN}\n"
    assert follow(tokenizer, prompt_of(PRICE, tool_choice="auto"), f"{thought} ")[0] == thought
    assert follow(tokenizer, prompt_of(PRICE, tool_choice="auto"), mark)[0] == mark
    one = guide_of(tokenizer).compiled(prompt_of(PRICE, tool_choice="auto")).matcher()
    assert ids("<|endoftext|>") not in allowed(tokenizer, one)


def test_names_and_values_may_hold_quotes_and_any_letter(tokenizer: Any) -> None:
    odd = spec('sag "größe" \\n', {"日本": {"const": 'a"b\\c\nd'}})
    text = write_call(odd.name, {"日本": 'a"b\\c\nd'})
    assert follow(tokenizer, prompt_of(odd), text) == (text, True)


def test_grammars_are_compiled_once_for_a_set_of_tools() -> None:
    guide = guide_of(make_tokenizer())
    assert guide.compiled(prompt_of(ORDER, PRICE)) is guide.compiled(prompt_of(ORDER, PRICE, text="Another question"))
    assert guide.compiled(prompt_of(ORDER, PRICE)) is not guide.compiled(prompt_of(PRICE, ORDER))
    assert not is_guided(prompt_of(ASK, tool_choice="auto"))


def test_a_matcher_that_fails_lets_the_answer_end() -> None:
    tokenizer = make_tokenizer()
    matcher = guide_of(tokenizer).compiled(prompt_of(PRICE)).matcher()
    matcher.accept(tokenizer.convert_tokens_to_ids("a"))
    assert allowed(tokenizer, matcher) == {tokenizer.eos_token_id}
    matcher.accept(tokenizer.eos_token_id)
    assert matcher.ended


def test_a_mask_touches_guided_rows_only() -> None:
    tokenizer = make_tokenizer()
    logits = torch.randn(3, len(tokenizer), generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    matcher = guide_of(tokenizer).compiled(prompt_of(PRICE)).matcher()
    hold(logits, {1: matcher})
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    kept = logits[1].isfinite()
    assert torch.equal(logits[1][kept], before[1][kept])
    # `<` and what else begins the mark.
    assert tokenizer.batch_decode(np.flatnonzero(kept).tolist()) == ["<"]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"a": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"a": {"not": {"type": "string"}}}, "not"),
        ({"a": {"type": "integer", "minimum": 3, "maximum": 1}}, "unsatisfiable"),
        ({"a": {"$ref": "http://nowhere.example/a"}}, "retriev"),
        ({"a": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"a": {"type": "string", "pattern": "(a"}}, "regex"),
        ({"a": {"type": "array", "items": {"type": "array", "maxItems": 100_000}}}, "maxItems is 100000; at most 1000"),
        ({"a": {"anyOf": [{"properties": {f"k{k}": {} for k in range(i)}} for i in range(100)]}}, "too big"),
    ],
)
def test_a_schema_that_cannot_be_guided_says_why(schema: dict[str, Any], says: str) -> None:
    fault = strict_fault(spec("bad", schema))
    assert fault is not None
    assert says in fault
    assert fault.endswith("simplify it, or drop strict")
    assert "\n" not in fault
    assert strict_fault(spec("bad", schema, strict=False)) is None


def test_schemas_of_every_usual_kind_can_be_guided() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    schemas: list[dict[str, Any]] = [
        {"properties": {"chain": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}},
        {"properties": {"a": {"type": "string", "pattern": "^[a-z]+$", "description": "x", "default": "y"}}},
        {"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "integer"}]}}, "title": "t"},
        {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}]},
        {"properties": {"day": {"type": "string", "format": "date"}}, "additionalProperties": {"type": "number"}},
        {},
    ]
    for schema in schemas:
        assert strict_fault(ToolSpec("t", "", json.dumps({"type": "object", **schema}), strict=True)) is None


def test_a_grammar_beyond_the_librarys_limits_is_refused_and_not_compiled() -> None:
    huge = [spec(f"tool{i}", {f"{i} {k}": {"type": "string"} for k in range(60)}) for i in range(100)]
    with pytest.raises(InvalidRequestError, match="cannot be guided together"):
        guide_of(make_tokenizer()).compiled(prompt_of(*huge))
