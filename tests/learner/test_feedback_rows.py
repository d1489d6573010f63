"""Corrections and thumbs as training rows: which are taken, and what they hold."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner.feedback_rows import rated_requests, write_feedback_files
from nightschool_server.chat import Message, Text, ToolCall, assistant, tool_result, user
from nightschool_server.ids import new_id
from nightschool_server.store.request_rows import LoggedMessage, RequestRecord, insert_request
from nightschool_server.store.store import Store

from tests.learner.practice_app import app
from tests.learner.practice_home import cycle_on, open_home

CALL = ToolCall("c", "price", '{"item":"mug"}')


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def log(store: Store, name: str, sent: list[Message], came: list[Message], **fields: Any) -> str:
    """Log an answered request: what was sent, and what the model and its tools said."""
    turns = [*(LoggedMessage(m) for m in sent), *(LoggedMessage(m, sampled=m.role == "assistant") for m in came)]
    values: dict[str, Any] = {"method": "generate", "policy": "train", "created_at": time.time(), **fields}
    record = RequestRecord(
        id=f"resp_{name}", caller="ann", adapter="1-abc", status="OK", ended_at=time.time(), messages=tuple(turns),
        **values,
    )  # fmt: skip
    with store.transaction() as db:
        insert_request(db, record)
    return record.id


def rate(store: Store, response_id: str, *, good: bool | None = None, correction: str = "") -> None:
    values = (new_id("fb"), response_id, "ann", good, "", correction, time.time())
    with store.transaction() as db:
        db.execute(
            "INSERT INTO feedback (id, response_id, caller, good, comment, correction, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            values,
        )


def written(store: Store, *overrides: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """Corrections, thumbs and counts of a cycle."""
    cycle = cycle_on(store, *overrides)
    counts = write_feedback_files(cycle)
    files = (cycle.folder / "corrections.jsonl", cycle.folder / "thumbs.jsonl")
    corrections, thumbs = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return corrections, thumbs, counts


def test_a_correction_is_a_prompt_and_what_the_answer_should_have_been(store: Store) -> None:
    rate(store, log(store, "a", [user("Write one word.")], [assistant("two words")]), correction="word")
    (row,), thumbs, counts = written(store)
    assert row == {
        "prompt": [{"role": "user", "content": "Write one word."}],
        "tools": None,
        "images": [],
        "response_id": "resp_a",
        "adapter": "1-abc",
        "completion": [{"role": "assistant", "content": "word"}],
    }
    assert thumbs == []
    assert counts == {"corrections": 1, "thumbs": 0}


def test_a_task_is_told_with_the_applications_prompt_tools_and_steps(store: Store) -> None:
    came = [assistant("<tool_call>..."), tool_result(CALL, "12"), assistant("It costs 13.")]
    response_id = log(store, "a", [user("What is the mug?", ["d" * 64])], came, method="task", outcome="answered")
    rate(store, response_id, good=False, correction="It costs 12.")
    (correction,), (thumb,), _ = written(store)
    assert [message["role"] for message in correction["prompt"]] == ["system", "user", "assistant", "tool"]
    assert correction["prompt"][0]["content"] == app.system_prompt
    assert [tool["function"]["name"] for tool in correction["tools"]] == [tool.spec.name for tool in app.tools]
    assert correction["images"] == ["d" * 64]
    assert correction["completion"][0]["content"] == "It costs 12."
    assert (thumb["completion"][0]["content"], thumb["label"]) == ("It costs 13.", False)


def test_the_latest_word_counts(store: Store) -> None:
    response_id = log(store, "a", [user("q")], [assistant("a")])
    rate(store, response_id, good=False, correction="b")
    rate(store, response_id, good=True)
    rate(store, response_id, correction="c")
    (correction,), (thumb,), _ = written(store)
    assert correction["completion"][0]["content"] == "c"
    assert thumb["label"] is True


def test_what_may_not_be_learned_from_is_left_out(store: Store) -> None:
    held_out = json.loads(Path(str(app.evaluation)).read_text().splitlines()[0])["prompt"]
    left_out = {
        "policy": log(store, "a", [user("a")], [assistant("x")], policy="log_only"),
        "held_out": log(store, "b", [user(held_out)], [assistant("x")]),
        "reserved": log(store, "c", [user("c")], [assistant("x")], session_id="some session"),
        "not_one_answer": log(store, "d", [user("d")], [assistant("x"), assistant("y")]),
        "unfinished": log(store, "e", [user("e")], [assistant("x")], method="task", outcome="max_steps"),
    }
    for response_id in left_out.values():
        rate(store, response_id, good=True, correction="z")
    corrections, thumbs, counts = written(store, "seeds.reserved_session_share=1")
    assert (corrections, thumbs) == ([], [])
    for reason in ("held_out", "reserved", "not_one_answer"):
        assert counts[f"feedback_dropped_{reason}"] == 1


def test_a_correction_after_a_tool_error_is_left_out_and_its_thumb_is_kept(store: Store) -> None:
    came = [assistant("<tool_call>..."), tool_result(CALL, "error: no", is_error=True), assistant("It costs 9.")]
    response_id = log(store, "a", [user("q")], came, method="task", outcome="answered", num_tool_errors=1)
    rate(store, response_id, good=False, correction="12")
    corrections, (thumb,), counts = written(store)
    assert corrections == []
    assert thumb["label"] is False
    assert counts["feedback_dropped_after_tool_error"] == 1


def test_the_newest_are_taken_and_zero_writes_nothing(store: Store) -> None:
    for number in range(4):
        name = f"{number}"
        rate(store, log(store, name, [user(name)], [assistant("x")], created_at=float(number)), good=True)
    log(store, "unrated", [user("x")], [Message("assistant", (Text("x"),))])
    assert [rated.response_id for rated in rated_requests(store, 2)] == ["resp_3", "resp_2"]
    assert len(written(store, "pairs.max_feedback=3")[1]) == 3
    cycle = cycle_on(store, "pairs.max_feedback=0")
    assert write_feedback_files(cycle) == {}
