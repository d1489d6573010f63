"""Code as the form of actions: what is read, what runs in the sandbox, and what goes on from step to step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nightschool_server import chat
from nightschool_server.agent.code import CodeFormat, normalised
from nightschool_server.agent.episode import DEFAULT_LIMITS, EpisodeResult, Event, Limits, ToolFinished, ToolStarted
from nightschool_server.agent.formats import ActionFormat, open_format
from nightschool_server.agent.loop import Episode, LiveActor, execute, run_episode
from nightschool_server.agent.signatures import functions_of, signature
from nightschool_server.agent.toolbox import Toolbox, open_tools
from nightschool_server.app import load_app
from nightschool_server.chat import ToolResult, ToolSpec
from nightschool_server.config.code import CodeConfig
from nightschool_server.config.serving import AgentConfig
from nightschool_server.errors import AppError
from nightschool_server.tools.state import ToolState

from tests.server.leaks import no_leaks
from tests.server.sandboxes import needs_sandbox
from tests.server.test_agent import Script

APP_REF = "tests.server.code_app:app"
APP = load_app(APP_REF)
CONFIG = AgentConfig(action_format="code", max_output_chars=500, code=CodeConfig(timeout_s=60))


def block(code: str) -> str:
    return f"I act.\n```python\n{code}\n```"


def code_of(text: str) -> str | None:
    calls = CodeFormat().parse(text).calls
    return json.loads(calls[0].arguments)["code"] if calls else None


@pytest.fixture
async def tools() -> AsyncIterator[Toolbox]:
    async with open_tools(APP, APP_REF, num_workers=1) as opened:
        yield opened


@pytest.fixture
async def written() -> AsyncIterator[ActionFormat]:
    async with open_format(CONFIG) as opened:
        yield opened


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(APP, tmp_path / "states")


async def episode_of(
    lines: list[str],
    written: ActionFormat,
    tools: Toolbox,
    state: ToolState,
    *,
    limits: Limits | None = None,
    events: list[Event] | None = None,
) -> EpisodeResult:
    async def on_event(event: Event) -> None:
        if events is not None:
            events.append(event)

    messages = written.begin((chat.system("Help."), chat.user("What?")), tools.tools)
    actor = LiveActor(Script(lines), tools, on_event=on_event, action_format=written)
    return await run_episode(Episode(messages, state, limits or Limits()), actor, on_event)


async def run_block(
    code: str, state: ToolState, tools: Toolbox, written: ActionFormat, limits: Limits = DEFAULT_LIMITS
) -> str:
    """The observation of one block on `state`."""
    execution = await execute(block(code), state, tools, limits=limits, action_format=written)
    part = execution.observations[0].parts[0]
    assert isinstance(part, ToolResult)
    return part.content


def observations(result: EpisodeResult) -> list[str]:
    return [part.content for message in result.messages for part in message.parts if isinstance(part, ToolResult)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Think.\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("<code>\nx = 1\n</code>", "x = 1"),
        ("```python\ns = '```'\n```", "s = '```'"),
        ("no block", None),
        ("```python\n\n```", None),
        ("```python\nx = 1", None),
        ("```python\nx = 1\n```\n```python\ny = 2\n```", None),
    ],
)
def test_one_block_of_code_is_read(text: str, code: str | None) -> None:
    assert code_of(text) == code


def test_what_is_no_block_says_what_is_wrong() -> None:
    assert "more than one block" in str(CodeFormat().parse("<code>1</code><code>2</code>").error)
    assert "not closed" in str(CodeFormat().parse("```python\n1").error)
    assert "at most" in str(CodeFormat().parse("x" * 1_000_001).error)


def test_comments_and_spacing_do_not_make_another_action_but_other_code_does() -> None:
    written = CodeFormat()
    same = [block("x = 1\nif x:\n    print(x)"), "Other words.\n" + block("# why\nx=1\n\nif x :\n  print( x )  # so")]
    assert written.key(same[0]) == written.key(same[1])
    others = [block("x = 2\nif x:\n    print(x)"), block("x = 1\nif x:\n    pass\nprint(x)"), "x = 1"]
    assert len({written.key(text) for text in [same[0], *others]}) == 4
    assert normalised("def (") == normalised("def  (")


@pytest.mark.parametrize(
    ("code", "tool"),
    [
        ("print(price(item='mug'))", "price"),
        ("def f(): pass\nlen('a'); x.note(); stock('mug')", "stock"),
        ("final_answer(3)", ""),
    ],
)
def test_the_tool_of_a_step_is_the_first_that_its_code_calls(code: str, tool: str) -> None:
    assert CodeFormat().tool_of(block(code)) == tool


def test_tools_become_functions_with_the_required_parameters_first() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "default": 1}, "b": {"enum": ["x", "y"], "description": "Which."}},
        "required": ["b"],
    }
    spec = ToolSpec("time.now", "The time.", json.dumps(schema))
    (function,) = functions_of([spec])
    assert (function.function, function.parameters) == ("time_now", ("b", "a"))
    assert signature(spec, function).splitlines() == [
        "def time_now(b: Literal['x', 'y'], a: int = 1):", '    """The time.', '    b: Which."""'
    ]  # fmt: skip


def test_two_tools_of_one_function_name_are_refused_with_both_named() -> None:
    specs = [ToolSpec(name, "", '{"type": "object"}') for name in ("time.now", "time_now")]
    with pytest.raises(AppError, match=r"'time.now' and 'time_now' are both time_now\(\) in code: rename one"):
        functions_of(specs)
    with pytest.raises(AppError, match="final_answer"):
        functions_of([ToolSpec("final_answer", "", '{"type": "object"}')])


def test_the_prompt_tells_of_form_and_functions_and_the_template_of_no_tool() -> None:
    written = CodeFormat()
    told = written.begin((chat.system("You help."), chat.user("?")), APP.specs)
    assert told[0].text.startswith("You help.\n\nAct by writing Python.")
    assert 'def price(item: str):\n    """The price of one item.' in told[0].text
    assert written.begin((chat.user("?"),), ())[0].role == "system"
    assert written.shown(APP.specs) == ()


@needs_sandbox
async def test_an_episode_of_code_calls_tools_keeps_its_variables_and_answers_with_a_number(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    events: list[Event] = []
    steps = [
        block("total = price('mug') * 3\ndef twice(): return total * 2\nprint('total', total)"),
        block("total += 1\nfrom math import sqrt\n[total, twice()]"),
        block("final_answer(sqrt(16) + total)"),
    ]
    result = await episode_of(steps, written, tools, state, events=events)
    assert (result.outcome, result.answer, result.num_steps) == ("answered", "26.0", 3)
    assert observations(result) == ["total 21", "[22, 44]", "final answer: 26.0"]
    calls = [(type(e).__name__, e.call.id, e.call.name) for e in events if isinstance(e, (ToolStarted, ToolFinished))]
    assert calls[:4] == [
        ("ToolStarted", "call_0", "python"), ("ToolStarted", "call_0.1", "price"),
        ("ToolFinished", "call_0.1", "price"), ("ToolFinished", "call_0", "python"),
    ]  # fmt: skip


@needs_sandbox
async def test_tools_give_values_raise_in_the_code_and_share_the_files(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    steps = [
        block("try:\n    price('nothing')\nexcept ToolError as error:\n    print('caught', error)"),
        block("note(item='mug')\nprint(open('list.txt').read(), note('lamp', quantity=2))"),
        block("open('mine.txt', 'w').write('mine')\nprint(files(), describe('mug')['tags'])"),
        block("price(1, 2, 3)"),
        block("price(item=3)"),
        block("final_answer('yes')"),
    ]
    result = await episode_of(steps, written, tools, state)
    caught, shared, listed, many, typed, _ = observations(result)
    assert caught == "caught no item is called 'nothing'"
    assert shared == "mug ['mug', 'lamp', 'lamp']"
    assert listed == "['list.txt', 'mine.txt'] ['cup', 'white']"
    assert many == "error: TypeError: price() takes 1 arguments, 3 were given (line 1: price(1, 2, 3))"
    assert "argument 'item': 3 is not of type 'string'" in typed
    assert json.loads(result.state.data) == {"list": ["mug", "lamp", "lamp"]}


@needs_sandbox
async def test_malformed_steps_are_told_how_to_write_one_and_end_the_task_at_their_limit(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    result = await episode_of(["The answer is 3.", block("def ("), ""], written, tools, state)
    assert (result.outcome, result.reason) == ("max_steps", "3 steps in a row could not be read")
    first, second, third = observations(result)
    assert first == f"error: the step holds no action; {written.hint}"
    assert second.startswith("error: SyntaxError:")
    assert second.endswith(written.hint)
    assert third == f"error: the step is empty; {written.hint}"


@needs_sandbox
async def test_a_variable_that_cannot_be_kept_is_named_and_the_others_are_kept(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    steps = [
        block("a = [1]\nb = a\nnumbers = (n for n in a)\nbig = 'x' * 5_000_000\nshow = price"),
        block("b.append(2)\nprint(a, show('mug'), 'numbers' in globals())"),
        block("final_answer(True)"),
    ]
    first, second, _ = observations(await episode_of(steps, written, tools, state))
    assert first.startswith("not kept: numbers (TypeError: cannot pickle 'generator' object); big (")
    assert "write it to a file" in first
    assert second == "[1, 2] 7 False"


@needs_sandbox
async def test_too_much_output_is_cut_with_a_mark_and_control_characters_are_shown_as_such(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    async def run(code: str) -> str:
        return await run_block(code, state, tools, written)

    assert await run("print('x' * 10_000_000)") == "x" * 500 + "\n[truncated: 500 of 10000001 characters]"
    assert await run(r"print('a\x1b[2Jb\x00c\ud800d\té')") == "a�[2Jb�c?d\té"
    assert await run("pass") == "done: the code printed nothing"


@needs_sandbox
@pytest.mark.parametrize(
    ("limits", "seen"),
    [
        (Limits(max_calls=3), "3 this step has made 3 tool calls; at most 3 are allowed"),
        (Limits(max_tool_s=0.0), "have used up their time"),
    ],
)
async def test_calls_of_code_count_against_the_limits(
    written: ActionFormat, tools: Toolbox, state: ToolState, *, limits: Limits, seen: str
) -> None:
    code = "n = 0\ntry:\n    while True: n += price('mug') // 7\nexcept ToolError as error: print(n, error)"
    assert seen in await run_block(code, state, tools, written, limits)


@needs_sandbox
async def test_nothing_of_a_rejected_candidate_reaches_a_sibling_or_the_continuation(
    written: ActionFormat, tools: Toolbox, state: ToolState
) -> None:
    async def run(code: str, on: ToolState) -> tuple[str, ToolState]:
        execution = await execute(block(code), on, tools, action_format=written)
        part = execution.observations[0].parts[0]
        assert isinstance(part, ToolResult)
        return part.content, execution.state

    _, begun = await run("x = [1]\nopen('kept', 'w').write('1')\nnote('mug')", state)
    spoil = (
        "import os, builtins, json\nx.append(99)\ny = 1\nopen('kept', 'w').write('99')\nopen('new', 'w').write('')\n"
        "os.environ['LEFT'] = '1'\nos.mkdir('inner'); os.chdir('inner')\nbuiltins.abs = lambda v: 99\n"
        "json.tool = None\nnote('lamp')\nopen('/tmp/left', 'w').write('')"
    )
    look = (
        "import os, json\nprint(x, 'y' in globals(), open('kept').read(), sorted(os.listdir()), 'LEFT' in os.environ, "
        "os.getcwd(), len(x), abs(-1), json.__dict__.get('tool', 1), os.path.exists('/tmp/left'), note('cup'))"
    )
    rejected, sibling = begun.fork(), begun.fork()
    (_, spoiled), (seen, _) = await asyncio.gather(run(spoil, rejected), run(look, sibling))
    spoiled.discard()
    clean = "[1] False 1 ['kept', 'list.txt'] False /workspace 1 1 1 False ['mug', 'cup']"
    assert seen == clean
    continued, _ = await run(look, begun)
    assert continued == clean, "neither is the continuation changed"


@needs_sandbox
async def test_a_cancelled_step_leaves_nothing_running_and_nothing_lying(
    written: ActionFormat, state: ToolState
) -> None:
    started = asyncio.Event()

    async def on_event(event: Event) -> None:
        if isinstance(event, ToolFinished):
            started.set()

    async with no_leaks(state.root), open_tools(APP, APP_REF, num_workers=1) as tools:
        code = block("price('mug')\nwhile True: pass")
        running = asyncio.create_task(execute(code, state, tools, on_event=on_event, action_format=written))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


@needs_sandbox
async def test_what_practice_may_not_run_refuses_the_step_and_what_was_simulated_marks_it(
    written: ActionFormat, state: ToolState
) -> None:
    async with open_tools(APP, APP_REF, num_workers=1, purpose="practice") as practising:
        refused = await execute(
            block("try:\n    send('you')\nexcept ToolError: pass"), state, practising, action_format=written
        )
        assert refused.failure == "refused", "catching it changes nothing"
        simulated = await execute(block("print(order('mug'))"), state, practising, action_format=written)
    part = simulated.observations[0].parts[0]
    assert isinstance(part, ToolResult)
    assert (part.content, part.simulated, simulated.failure) == ("would order mug", True, "")
