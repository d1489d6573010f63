"""What is taken out of logged text, and what stays."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from nightschool_server.chat import File, Image, Message, Text, ToolCall, ToolResult, template_messages
from nightschool_server.store.redact import keep_all, redact_message, redact_patterns, redactor_of


def test_the_names_of_files_are_text_and_what_they_hold_is_not() -> None:
    file = File("ann@shop.example.org.csv", "text/csv", 4, "0" * 64)
    told = Message("tool", (ToolResult("c", "export", "done", images=("1" * 64,), files=(file,)),))
    asked = Message("user", (file, Text("read it")))
    kept = replace(file, name=redact_patterns(file.name))
    assert "ann@" not in kept.name
    assert redact_message(asked, redact_patterns).files == (kept,)
    assert redact_message(told, redact_patterns) == replace(told, parts=(replace(told.parts[0], files=(kept,)),))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("mail ann.b+c@shop.example.org, now", "mail [email], now"),
        ("card 4111 1111 1111 1111.", "card [card]."),
        ("card 4111-1111-1111-1111", "card [card]"),
        ("5500005555555559", "[card]"),
        ("Authorization: Bearer abcdefghijklmnop1234==", "Authorization: Bearer [secret]"),
        ("key sk-proj-abcdefghijklmnop123", "key [secret]"),
        ("ns_" + "a" * 43, "[secret]"),
        ("token ghp_" + "a" * 36, "token [secret]"),
        ("AKIAIOSFODNN7EXAMPLE", "[secret]"),
    ],
)
def test_what_must_not_be_stored_is_replaced(text: str, kept: str) -> None:
    assert redact_patterns(text) == kept
    assert redactor_of(False)(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "12 apples at 3.50 each, 1234567890123 in stock",
        "4111 1111 1111 1112 fails the check",
        "order 00012345, a@b, @home, user@localhost",
        "the bearer of bad news",
        "3.14159265358979323846",
        "",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact_patterns(text) == text


def test_every_text_of_a_message_is_redacted_and_json_stays_json() -> None:
    arguments = json.dumps(
        {"to": "ann@example.org", "card": 4111111111111111, "n": 3, "list": [{"x": "b@example.org"}]}
    )
    message = Message(
        "assistant",
        (
            Text("to ann@example.org"),
            Image("ab" * 32),
            ToolCall("1", "send", arguments),
            ToolCall("2", "bad", "{a@b.org"),
        ),
    )
    redacted = redact_message(message, redact_patterns)
    assert redacted.parts[0] == Text("to [email]")
    assert redacted.parts[1] == message.parts[1]
    call = redacted.parts[2]
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"to": "[email]", "card": "[card]", "n": 3, "list": [{"x": "[email]"}]}
    assert redacted.parts[3] == ToolCall("2", "bad", "{[email]")
    template_messages([Message("assistant", redacted.parts[:3])])
    result = Message("tool", (ToolResult("1", "send", "sent to ann@example.org"),))
    assert redact_message(result, redact_patterns).parts == (ToolResult("1", "send", "sent to [email]"),)
    assert redact_message(message, keep_all) == message


def test_arguments_without_anything_to_redact_keep_their_bytes() -> None:
    call = ToolCall("1", "add", '{ "b": 2,  "a": 1 }')
    assert redact_message(Message("assistant", (call,)), redact_patterns).parts == (call,)


def test_a_long_text_takes_no_time_to_speak_of() -> None:
    for hostile in ("a" * 200_000, "a." * 100_000, "1 " * 100_000, "a@" * 100_000, "eyJ" * 60_000, "sk-" * 60_000):
        redact_patterns(hostile)
