"""What an application may bring, and what it is told when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nightschool_server.agent.toolbox import list_tools
from nightschool_server.app import (
    App,
    AppError,
    EvaluationTask,
    Tool,
    is_correct,
    load_app,
    load_evaluation,
    tool,
)
from nightschool_server.chat import ToolSpec


@tool(effect="read_only")
def price(item: str) -> int:
    """The price."""
    return len(item)


def test_an_application_knows_its_tools_in_their_order() -> None:
    app = load_app("tests.server.tools_app:app")
    assert [spec.name for spec in app.specs][:3] == ["add", "add_later", "put"]
    add = app.tool("add")
    assert add is not None
    assert app.timeout_s(add) == 30
    assert app.tool("fly") is None


async def test_the_shop_lists_the_tools_it_was_trained_on() -> None:
    from examples.shop.toolbox import TOOLS

    assert await list_tools(load_app("examples.shop.app:app")) == TOOLS


def test_two_tools_of_one_name_are_refused_with_both_places() -> None:
    other = Tool(price.spec, test_an_application_knows_its_tools_in_their_order)
    with pytest.raises(AppError, match="two tools called 'price'") as raised:
        App("shop", "", [price, other])
    assert price.where in str(raised.value)
    assert other.where in str(raised.value)


def test_what_an_application_must_not_be() -> None:
    with pytest.raises(AppError, match="put @tool"):
        App("shop", "", [len])  # type: ignore[list-item]
    with pytest.raises(AppError, match="name"):
        App(" ", "")
    with pytest.raises(AppError, match="max_steps is 0"):
        App("shop", "", max_steps=0)
    with pytest.raises(AppError, match="tool_timeout_s is 0"):
        App("shop", "", tool_timeout_s=0)
    with pytest.raises(AppError, match="initial_state"):
        App("shop", "", initial_state={"a": {1}})


@pytest.mark.parametrize(
    ("source", "ref", "message"),
    [
        ("", "shop", "must be written module:attribute"),
        ("", "no_such_module:app", "no module 'no_such_module'"),
        ("", "{module}.sub:app", "no module '{module}.sub'"),
        ("import no_such_library", "{module}:app", "imports 'no_such_library', which is not installed"),
        ("1 / 0", "{module}:app", "importing it raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "{module}:app", "importing it raised SystemExit: 3"),
        ("", "{module}:app", "has no 'app': write `app = App"),
        ("app = 3", "{module}:app", "is a int, not an App"),
    ],
)
def test_an_application_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, ref: str, message: str
) -> None:
    module = f"app_{abs(hash((source, ref)))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AppError) as raised:
        load_app(ref.format(module=module))
    assert message.format(module=module) in str(raised.value)


def test_a_hand_written_schema_is_checked_when_the_application_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app_with_wrong_schema.py").write_text(
        "from nightschool_server.app import App, Tool\n"
        "from nightschool_server.chat import ToolSpec\n"
        """app = App("shop", "", [Tool(ToolSpec("price", "", '{"type": "objekt"}'), print)])\n"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AppError, match="the schema of tool 'price'"):
        load_app("app_with_wrong_schema:app")
    assert ToolSpec("price", "", "{}").schema == {}


def test_a_strict_tool_that_cannot_be_guided_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app_with_unguidable_tool.py").write_text(
        "from nightschool_server.app import App, Tool, tool\n"
        "from nightschool_server.chat import ToolSpec\n"
        "@tool(effect='read_only', strict=True)\n"
        "def price(item: str) -> int:\n"
        "    'The price.'\n"
        "    return 7\n"
        """schema = '{"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}'\n"""
        "fine = App('shop', '', [price])\n"
        "app = App('shop', '', [price, Tool(ToolSpec('sort', '', schema, strict=True), print)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [spec.strict for spec in load_app("app_with_unguidable_tool:fine").specs] == [True]
    with pytest.raises(AppError, match=r"strict tool 'sort' .*uniqueItems.*: simplify it, or drop strict"):
        load_app("app_with_unguidable_tool:app")


@pytest.mark.parametrize(
    ("match", "answer", "given", "correct"),
    [
        ("number", "1200", "$1,200", True),
        ("number", "1200", " 1200.0. ", True),
        ("number", "0.1", ".1", True),
        ("number", "12", "12 %", True),
        ("number", "-3", "-3", True),
        ("number", "12", "13", False),
        ("number", "12", "about 12", False),
        ("number", "12", "", False),
        ("number", "12", "nan", False),
        ("number", "12", "1_2", False),
        ("text", "Yes", " yes. ", True),
        ("text", "dark  red", "Dark red", True),
        ("text", "yes", "yes, it is", False),
        ("text", "12", "12.0", False),
    ],
)
def test_an_answer_is_right_or_not(match: str, answer: str, given: str, correct: bool) -> None:
    task = EvaluationTask("1", "family", "prompt", answer, match)  # type: ignore[arg-type]
    assert is_correct(task, given) is correct


def write_tasks(path: Path, *tasks: object) -> App:
    path.write_text("\n".join(task if isinstance(task, str) else json.dumps(task) for task in tasks))
    return App("shop", "", evaluation=path)


TASK = {"id": "1", "family": "sum", "prompt": "1 + 1", "answer": "2", "match": "number"}


def test_held_out_tasks_are_read_with_their_images(tmp_path: Path) -> None:
    (tmp_path / "tag.png").write_bytes(b"png")
    other = {"id": "2", "family": "tag", "prompt": "price?", "answer": "red", "images": ["tag.png"]}
    tasks = load_evaluation(write_tasks(tmp_path / "tasks.jsonl", TASK, "", other)).tasks
    assert tasks == (
        EvaluationTask("1", "sum", "1 + 1", "2", "number"),
        EvaluationTask("2", "tag", "price?", "red", "text", (tmp_path / "tag.png",)),
    )


def test_the_digest_names_the_content_and_not_the_order(tmp_path: Path) -> None:
    image = tmp_path / "tag.png"
    image.write_bytes(b"png")
    first, second = TASK, {**TASK, "id": "2", "images": ["tag.png"]}
    path = tmp_path / "tasks.jsonl"
    digest = load_evaluation(write_tasks(path, first, second)).digest
    assert load_evaluation(write_tasks(path, second, first)).digest == digest
    assert load_evaluation(write_tasks(path, first, {**second, "answer": "3"})).digest != digest
    image.write_bytes(b"other")
    assert load_evaluation(write_tasks(path, first, second)).digest != digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        ({"id": "2"}, "line 2: 'family' is missing"),
        ({**TASK, "id": 2}, "line 2: 'id' is 2; it must be a str"),
        (TASK, "line 2: id '1' was used before"),
        ({**TASK, "id": "2", "matches": ""}, "line 2: unknown key 'matches'"),
        ({**TASK, "id": "2", "match": "fuzzy"}, "line 2: match 'fuzzy' must be"),
        ({**TASK, "id": "2", "answer": "two"}, "line 2: answer 'two' is not a number"),
        ({**TASK, "id": "2", "images": ["no.png"]}, "line 2: image 'no.png' is not a file"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(AppError, match=message):
        load_evaluation(write_tasks(tmp_path / "tasks.jsonl", TASK, line))


def test_no_held_out_tasks_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(AppError, match="has no evaluation set: give App"):
        load_evaluation(App("shop", ""))
    with pytest.raises(AppError, match="cannot be read"):
        load_evaluation(App("shop", "", evaluation=tmp_path / "none"))
    with pytest.raises(AppError, match="has no tasks"):
        load_evaluation(write_tasks(tmp_path / "tasks.jsonl"))


def test_the_application_in_the_docs_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    source = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "shop_of_the_docs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    shop = load_app("shop_of_the_docs:app")
    assert [(tool.spec.name, tool.effect) for tool in shop.tools] == [("price", "read_only"), ("note", "workspace")]
    assert shop.tools[0]("mug") == 7
