"""`nightschool check`: each mistake is one line with its place and the remedy, and nothing is changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nightschool_server.main import main

from tests.server import mcp_probe

MODEL = Path(__file__).resolve().parents[2] / "examples" / "shop" / "model"
HEAD = "from pathlib import Path\nfrom nightschool_server.app import App, tool\n"
PRICE = '@tool(effect="read_only")\ndef price(item: str) -> int:\n    """The price."""\n    return 3\n'
TASK = {"id": "a", "family": "price", "prompt": "What is it?", "answer": "3"}

Found = dict[tuple[str, str], list[str]]
Check = Callable[..., tuple[int, Found]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a user stands in; what is imported from it is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command on an `app.py` in the folder: the exit code, and `state: text` by group and name."""

    def run(source: str | None, *arguments: str) -> tuple[int, Found]:
        if source is not None:
            (folder / "app.py").write_text(HEAD + source)
        code = main(["check", "app:app", "--home", str(folder / "home"), "--json", *arguments])
        found: Found = {}
        for one in json.loads(capsys.readouterr().out):
            found.setdefault((one["group"], one["name"]), []).append(f"{one['state']}: {one['text']}")
        assert not (folder / "home").exists()
        return code, found

    return run


def write_tasks(folder: Path, *lines: object) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "tasks.jsonl").write_text("\n".join(texts))


def test_the_shop_is_in_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["check", "examples.shop.app:app", "--model", str(MODEL), "--home", str(tmp_path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "FAULT" not in text
    assert "440 tasks in 10 families" in text
    assert "shows all 5 tools, without their descriptions" in text
    assert "tokens, agent.max_tokens 256" in text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "no module 'app'"),
        ("app = App(", "SyntaxError: '(' was never closed (app.py, line 3)"),
        ("import no_such_library", "imports 'no_such_library', which is not installed"),
        ("\nnames = {}\nprint(names['a'])", "KeyError: 'a' (at app.py:5)"),
        ("@tool\ndef price(item: str) -> int:\n    return 3", "app.py:3: tool 'price' has no docstring"),
        (
            "@tool\ndef price(item):\n    '''The price.'''",
            "app.py:3: tool 'price': parameter 'item' has no type hint",
        ),
        (PRICE + "app = App('shop', 'Help.', [price, price])", "two tools called 'price', at app.py:3"),
        ("app = App('shop', 'Help.', initial_state={'a': {1}})", "initial_state is not made of JSON values"),
        ("application = App('shop', 'Help.')", "module 'app' has no 'app': write `app = App(...)` in it"),
    ],
)
def test_an_application_that_cannot_be_imported_is_one_fault(
    source: str | None, told: str, check: Check, folder: Path
) -> None:
    code, found = check(source)
    assert code == 1
    ((text,),) = found.values()
    assert text.startswith("fault: ")
    assert told in text


def test_tools_that_work_less_well_than_they_could_are_told_with_their_place(check: Check) -> None:
    sends = "@tool\ndef send(to: str) -> str:\n    '''Send it.'''\n    return to\n"
    calls = (
        "def called() -> str:\n    return 'hello'\n\n\n@tool(simulate=called)\ndef call() -> str:\n    '''Call.'''\n"
    )
    code, found = check(PRICE + sends + calls + "app = App('shop', '', [price, send, call])")
    assert code == 0
    assert found["tools", "price"] == ["no: read_only, but the docstring's Args: does not describe item (app.py:3)"]
    assert found["tools", "send"][0].startswith("no: external: practice never runs it")
    assert found["tools", "call"] == ["ok: external, simulated in practice (app.py:15)"]
    assert "app.py:7" in found["tools", "send"][0]
    assert found["app", "prompt"][0].startswith("no: system_prompt is empty")
    assert found["evaluation", ""][0].startswith("no: none: nothing is ever promoted")


def test_a_strict_tool_that_cannot_be_guided_is_a_fault(check: Check) -> None:
    source = (
        "from nightschool_server.app import Tool\nfrom nightschool_server.chat import ToolSpec\n"
        'SCHEMA = \'{"type":"object","properties":{"a":{"type":"array","uniqueItems":true}}}\'\n'
        "app = App('shop', 'Help.', [Tool(ToolSpec('send', 'Send.', SCHEMA, strict=True), len, 'read_only')])"
    )
    code, found = check(source)
    assert code == 1
    assert "cannot be guided" in found["tools", "send"][0]


def test_every_broken_line_of_the_evaluation_set_is_told(check: Check, folder: Path) -> None:
    write_tasks(folder, TASK, "{", {**TASK, "id": "b", "images": ["none.png"]}, TASK)
    code, found = check(PRICE + "app = App('shop', 'Help.', [price], Path('tasks.jsonl'))")
    assert code == 1
    told = found["evaluation", "lines"]
    assert ["line 2: not JSON" in told[0], "line 3: image 'none.png'" in told[1], "line 4: id 'a'" in told[2]] == [
        True
    ] * 3


def test_many_faults_of_one_kind_are_counted(check: Check, folder: Path) -> None:
    write_tasks(folder, *["{"] * 9)
    _, found = check("app = App('shop', 'Help.', evaluation=Path('tasks.jsonl'))")
    assert len(found["evaluation", "lines"]) == 6
    assert found["evaluation", "lines"][-1] == "fault: and 4 more of this kind"


def test_tasks_that_ask_the_same_and_unreadable_images_are_told(check: Check, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    write_tasks(
        folder,
        TASK,
        {**TASK, "id": "b", "prompt": "what  is it?"},
        {**TASK, "id": "c", "answer": "4"},
        {**TASK, "id": "d", "images": ["broken.png"]},
    )
    code, found = check("app = App('shop', 'Help.', evaluation=Path('tasks.jsonl'))")
    assert code == 1
    assert found["evaluation", ""] == ["ok: tasks.jsonl: 4 tasks in 1 families: price 4"]
    assert found["evaluation", "repeated"] == [
        "fault: lines 1 and 3 ask the same and have different answers: mend one",
        "no: line 2 asks what line 1 asks: it counts twice, drop one",
    ]
    assert found["evaluation", "images"][0].startswith("fault: line 4: image broken.png cannot be read")
    assert "the gate needs 200 (learner.gate.min_n)" in found["evaluation", "number"][0]


@pytest.mark.parametrize(
    ("template", "name", "told"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "tools", "does not show the model the tools price"),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}{{ tools }}",
            "results",
            "leaves results of tools out",
        ),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
            "{{ m.content }}{% endfor %}{{ tools }}",
            "prompt",
            "refuses these messages: No system role",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}{{ tools }}",
            "prompt",
            "system prompt",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}{{ tools }}",
            "calls",
            "changes the model's own call",
        ),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_a_fault(
    template: str, name: str, told: str, check: Check, folder: Path
) -> None:
    model = folder / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(template)
    code, found = check(PRICE + "app = App('shop', 'You help.', [price])", "--model", str(model))
    assert code == 1
    assert found["template", name][0].startswith("fault: ")
    assert told in found["template", name][0]


def test_code_actions_are_told_and_counted_in_the_prompt(check: Check) -> None:
    source = PRICE + "app = App('shop', 'You help.', [price])"
    (_, calls), (code, found) = (
        check(source, "--model", str(MODEL), "--set", f"agent.action_format={name}") for name in ("tool_calls", "code")
    )
    assert code == 0
    assert found["template", "form"] == ["ok: the model acts by writing Python (agent.action_format)"]
    assert found["template", "tools"] == ["ok: shows all 1 tools"]
    assert found["context", ""] != calls["context", ""]


def test_a_model_folder_without_a_template_and_a_short_context_are_faults(check: Check, folder: Path) -> None:
    source = PRICE + "app = App('shop', 'You help.', [price])"
    shutil.copytree(MODEL, folder / "model")
    code, found = check(source, "--model", str(folder / "model"), "--set", "engine.context_length=64")
    assert code == 1
    assert "nothing is left for a task; shorten them" in found["context", ""][0]
    (folder / "model" / "chat_template.jinja").unlink()
    code, found = check(source, "--model", str(folder / "model"))
    assert code == 1
    assert "has no chat template: put a chat_template.jinja beside" in found["model", ""][0]


def test_no_application_is_the_users_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "app.py", "--home", str(folder)]) == 2
    assert "app 'app.py' must be written module:attribute" in capsys.readouterr().err
    assert main(["check", "--home", str(folder)]) == 2
    assert capsys.readouterr().err.strip() == (
        "nightschool: no application is named: nightschool check app:app, or set agent.app"
    )


def test_mcp_servers_are_started_and_their_tools_told(check: Check) -> None:
    schema = {"type": "object", "properties": {}}
    listed = [
        {"name": "look", "description": "Look.", "inputSchema": schema, "annotations": {"readOnlyHint": True}},
        {"name": "send", "description": "Send.", "inputSchema": schema},
        {"name": "call", "description": "Call.", "inputSchema": schema},
    ]
    command = [sys.executable, "-S", mcp_probe.__file__, "--tools", json.dumps(listed)]
    source = (
        "from nightschool_server.app import McpServer\n"
        f"COMMAND = {command!r}\n"
        "good = McpServer('good', command=COMMAND, simulate={'call': lambda: 'called'})\n"
        "app = App('shop', 'Help.', mcp=[good])"
    )
    code, found = check(source)
    assert code == 0
    assert found["mcp", "good"] == ["ok: starts, 3 tools (app.py:5)"]
    assert found["mcp", "good.look"] == ["ok: read_only"]
    assert found["mcp", "good.send"][0].startswith("no: external: practice never runs it: name its effect in effects")
    assert found["mcp", "good.call"] == ["ok: external, simulated in practice"]
    assert found["app", ""] == ["ok: app:app: 'shop', 3 tools"]


def test_an_mcp_server_that_does_not_start_and_a_name_that_comes_twice_are_faults(check: Check) -> None:
    schema = {"type": "object", "properties": {}}
    listed = [{"name": "look", "description": "Look.", "inputSchema": schema, "annotations": {"readOnlyHint": True}}]
    command = [sys.executable, "-S", mcp_probe.__file__, "--tools", json.dumps(listed)]
    code, found = check(
        "from nightschool_server.app import McpServer\n"
        f"one = McpServer('one', command={command!r})\n"
        f"two = McpServer('two', command={command!r}, prefix='one')\n"
        "dead = McpServer('dead', command=['/no/such/program'])\n"
        "app = App('shop', 'Help.', mcp=[one, two, dead])"
    )
    assert code == 1
    assert found["mcp", "dead"][0].startswith("fault: MCP server 'dead' (app.py:6)")
    assert "two tools called 'one.look'" in found["tools", "names"][0]
    assert "app.py:4" in found["tools", "names"][0]
    assert "app.py:5" in found["tools", "names"][0]
