"""Reading what a model writes as a tool call, right or wrong."""

from __future__ import annotations

import json
import random

import pytest
from nightschool_server.agent.toolcalls import CLOSE, MAX_ANSWER_CHARS, OPEN, parse_answer, write_call


def test_a_written_call_is_read_back_with_the_text_around_it() -> None:
    arguments = {"item": "mug", "quantity": 2, "note": "ça coûte 3 € 🍵", "nested": {"list": [1, None, True]}}
    answer = parse_answer(f"Let me see.\n{write_call('price', arguments)}\n")
    assert answer.error is None
    assert answer.text == "Let me see."
    assert [(call.id, call.name) for call in answer.calls] == [("call_0", "price")]
    assert json.loads(answer.calls[0].arguments) == arguments


def test_text_without_markup_is_a_final_answer() -> None:
    answer = parse_answer(" 42 \n")
    assert (answer.text, answer.calls, answer.error) == ("42", (), None)


def test_equal_calls_are_kept_each_with_its_own_id() -> None:
    answer = parse_answer(write_call("reserve", {"item": "mug"}) * 2)
    assert [call.id for call in answer.calls] == ["call_0", "call_1"]
    assert answer.calls[0].arguments == answer.calls[1].arguments


def test_an_argument_may_hold_the_tags() -> None:
    written = {"text": f"say {CLOSE} and {OPEN}"}
    answer = parse_answer(write_call("say", written))
    assert answer.error is None
    assert json.loads(answer.calls[0].arguments) == written


def test_arguments_may_be_left_out() -> None:
    assert parse_answer(f'{OPEN}{{"name": "basket_total"}}{CLOSE}').calls[0].arguments == "{}"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("price(mug)", "tool call is not JSON"),
        ("", "tool call is not JSON"),
        ('["price"]', "must be an object"),
        ('{"arguments": {}}', "must be an object"),
        ('{"name": 3, "arguments": {}}', "must be an object"),
        ('{"name": "", "arguments": {}}', "1 to 128 characters"),
        ('{"name": "price", "arguments": "mug"}', "must be an object"),
        ('{"name": "price", "arguments": {"a": 1, "a": 2}}', "a key twice"),
        ('{"name": "price", "arguments": {"a": NaN}}', "NaN"),
        ('{"name": "price", "arguments": {"a": 1e999}}', "too large"),
        ('{"name": "price", "arguments": {"a": ' + "9" * 5000 + "}}", "digits"),
        ('{"name": "price", "arguments": {"a": "\\ud800"}}', "surrogate"),
        ('{"name": "price", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}", "levels deep"),
        ('{"name": "price", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "nested too deeply"),
        ('{"name": "price", "arguments": {}} {}', "goes on behind"),
    ],
)
def test_malformed_markup_is_named(body: str, error: str) -> None:
    good = write_call("stock", {"item": "mug"})
    answer = parse_answer(f"{good}{OPEN}{body}{CLOSE}{good}")
    assert answer.error is not None
    assert error in answer.error
    assert [call.name for call in answer.calls] == ["stock"], "only those before the fault"


def test_unbalanced_tags_are_named() -> None:
    assert parse_answer(f'{OPEN}{{"name": "price"}}').error == f"{OPEN} without {CLOSE}"
    assert parse_answer(f"{OPEN}{{").error == f"{OPEN} without {CLOSE}"
    assert parse_answer(f'{{"name": "price"}}{CLOSE}').error == f"{CLOSE} without {OPEN}"


def test_an_answer_without_bounds_is_not_read() -> None:
    assert "at most" in (parse_answer("x" * (MAX_ANSWER_CHARS + 1)).error or "")


def test_no_answer_raises() -> None:
    rng = random.Random(0)
    pieces = [
        OPEN,
        CLOSE,
        "{",
        "}",
        '"name"',
        ":",
        '"a"',
        "[",
        "]",
        ",",
        '"arguments"',
        "\\",
        "\ud800",
        "1e9",
        " ",
        '"',
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        answer = parse_answer(text)
        assert not (answer.error is None and OPEN in answer.text)
