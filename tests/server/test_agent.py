"""The agent loop over real tools; only the model is a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from nightschool_server import chat
from nightschool_server.agent.executors import ClientAnswer, ClientExecutor, RoutingExecutor, ToolExecutor
from nightschool_server.agent.loop import (
    Episode,
    EpisodeResult,
    Event,
    Finished,
    Limits,
    LiveActor,
    StepFinished,
    TextDelta,
    ToolFinished,
    ToolStarted,
    execute,
    run_episode,
)
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import load_app
from nightschool_server.chat import ToolCall, ToolResult, ToolSpec
from nightschool_server.engine import Delta, FinishReason, Prompt, Sampling
from nightschool_server.errors import ContextOverflowError, EngineDeadError, InvalidRequestError
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import CallLimits

from tests.server.leaks import make_fifo, no_leaks, read_pids

APP_REF = "tests.server.tools_app:app"
APP = load_app(APP_REF)
ECHO = ToolSpec("echo", "Echo.", '{"type": "object", "properties": {"text": {"type": "string"}}}')
ADD = write_call("add", {"a": 1, "b": 2})


Run = Callable[..., asyncio.Task[EpisodeResult]]


@dataclass
class Script:
    """A sampler that says its lines, a character a token; the last one for ever."""

    lines: Sequence[str]
    finish_reason: FinishReason | None = "stop"
    prompts: list[Prompt] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    num_open: int = 0
    waits: asyncio.Event = field(default_factory=asyncio.Event)

    async def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        line = self.lines[min(len(self.prompts), len(self.lines) - 1)]
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        if line == "overflow":
            raise ContextOverflowError("messages", "too long")
        self.num_open += 1
        try:
            text = line[: sampling.max_tokens]
            reason = self.finish_reason if text == line else "length"
            for index, character in enumerate(text):
                last = index == len(text) - 1
                yield Delta(0, character, (ord(character),), (-0.5,), (), reason if last else None, 10, 3)
                if line == "wait":
                    self.waits.set()
                    await asyncio.Event().wait()
            if not text:
                yield Delta(0, "", (), (), (), reason, 10, 3)
        finally:
            self.num_open -= 1


@pytest.fixture
async def executor() -> AsyncIterator[ToolExecutor]:
    async with open_tools(APP, APP_REF, num_workers=1, limits=CallLimits(max_output_chars=1000)) as tools:
        yield tools


@pytest.fixture
def state(tmp_path: Path) -> ToolState:
    return ToolState.initial(APP, tmp_path / "states")


@pytest.fixture
def run(executor: ToolExecutor, state: ToolState) -> Run:
    def start(
        script: Script, limits: Limits | None = None, events: list[Event] | None = None
    ) -> asyncio.Task[EpisodeResult]:
        async def on_event(event: Event) -> None:
            if events is not None:
                events.append(event)

        episode = Episode((chat.system(APP.system_prompt), chat.user("What?")), state, limits or Limits())
        actor = LiveActor(script, executor, on_event=on_event)
        return asyncio.create_task(run_episode(episode, actor, on_event))

    return start


def last_result(result: EpisodeResult) -> ToolResult:
    part = result.messages[-1].parts[0]
    assert isinstance(part, ToolResult)
    return part


async def test_an_episode_calls_tools_and_answers(run: Run) -> None:
    script, events = Script([f"First:{ADD}", " 3 "]), list[Event]()
    result = await run(script, None, events)
    assert (result.outcome, result.answer, result.reason) == ("answered", "3", "")
    assert result.messages == (
        chat.assistant(f"First:{ADD}"),
        chat.tool_result(ToolCall("call_0", "add", '{"a": 1, "b": 2}'), "3"),
        chat.assistant(" 3 "),
    )
    assert script.prompts[1].messages[2:] == result.messages[:2], "history is verbatim"
    assert script.prompts[0].tools == APP.specs
    assert (result.num_steps, result.num_tool_errors) == (2, 0)
    assert result.usage.completion_tokens == len(f"First:{ADD}") + 3
    assert result.usage.prompt_tokens == 20
    assert result.usage.cached_tokens == 6
    assert result.steps[1].token_ids == (32, 51, 32)
    assert result.steps[1].logprobs == (-0.5, -0.5, -0.5)
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    assert kinds == [ToolStarted, ToolFinished, StepFinished, StepFinished, Finished]
    assert "".join(e.delta.text for e in events if isinstance(e, TextDelta)) == f"First:{ADD} 3 "


async def test_calls_of_one_step_run_in_order_on_one_state(run: Run) -> None:
    both = write_call("put", {"item": "mug"}) + write_call("put", {"item": "lamp"})
    result = await run(Script([both, write_call("look", {}), "done"]))
    observations = [m.parts[0] for m in result.messages if m.role == "tool"]
    assert [part.content for part in observations[:2]] == ['["mug"]', '["mug","lamp"]']
    assert '"files":["lamp","mug"]' in observations[2].content
    assert result.state.data == '{"basket":["mug","lamp"]}'


@pytest.mark.parametrize(
    ("text", "failure", "content"),
    [
        ("<tool_call>add(1, 2)</tool_call>", "parse", "tool call is not JSON"),
        ("<tool_call>", "parse", "without"),
        ("", "parse", "the step is empty"),
        (ADD * 17, "parse", "the step has 17 tool calls; at most 16"),
        (f"{ADD}<tool_call>", "parse", "without"),
        (write_call("fly", {}), "schema", "no tool is called 'fly'"),
        (write_call("add", {"a": 1}), "schema", "'b' is a required property"),
        (write_call("add", {"a": "1", "b": 2}), "schema", "argument 'a': '1' is not of type 'integer'"),
        (write_call("add", {"a": 1, "b": 2, "c": 3}), "schema", "'c' was unexpected"),
        (write_call("fail_by_mistake", {}), "execution", "KeyError"),
        (write_call("crash", {"how": "segfault"}), "execution", "SIGSEGV"),
        (ADD + write_call("fly", {}) + ADD, "schema", "3"),
    ],
)
async def test_what_a_model_does_wrong_is_an_observation(
    executor: ToolExecutor, state: ToolState, text: str, failure: str, content: str
) -> None:
    executed = await execute(text, state, executor)
    assert executed.failure == failure
    assert not executed.final
    result = executed.observations[-1].parts[0]
    assert isinstance(result, ToolResult)
    assert content in result.content
    assert len(executed.observations) == max(len(executed.calls), 1)


async def test_malformed_output_gets_a_hint_and_is_tolerated_so_often(run: Run) -> None:
    result = await run(Script(["<tool_call>", ADD, "<tool_call>", "<tool_call>", "<tool_call>"]))
    assert (result.outcome, result.num_steps, result.num_tool_errors) == ("max_steps", 5, 4)
    assert result.reason == "3 steps in a row could not be read"
    assert last_result(result).content.endswith("or answer without one")


async def test_steps_are_limited(run: Run) -> None:
    result = await run(Script([ADD]), Limits(max_steps=2))
    assert (result.outcome, result.num_steps, result.answer) == ("max_steps", 2, "")
    assert result.reason == "no answer after 2 steps"


async def test_a_step_cut_off_by_its_tokens_runs_nothing_and_ends_the_episode(run: Run) -> None:
    result = await run(Script([f"{ADD}and more"]), Limits(max_step_tokens=len(ADD) + 1))
    assert (result.outcome, result.num_steps, result.answer) == ("max_tokens", 1, "a")
    assert result.steps[0].failure == "budget"
    assert len(result.messages) == 1


async def test_tokens_of_all_steps_are_limited(run: Run) -> None:
    script = Script([ADD])
    result = await run(script, Limits(max_tokens=len(ADD) * 2))
    assert (result.outcome, result.num_steps) == ("max_tokens", 2)
    assert [sampling.max_tokens for sampling in script.samplings] == [len(ADD) * 2, len(ADD)]


async def test_time_is_limited_and_the_running_tool_is_killed(run: Run, tmp_path: Path, state: ToolState) -> None:
    fifo = make_fifo(tmp_path)
    episode = run(Script([ADD, write_call("hang", {"fifo": str(fifo)})]), Limits(max_time_s=5))
    pids = await read_pids(fifo)
    result = await episode
    assert (result.outcome, result.num_steps) == ("max_time", 1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_cancelling_stops_the_model(run: Run) -> None:
    script = Script(["wait"])
    episode = run(script)
    await script.waits.wait()
    episode.cancel()
    with pytest.raises(asyncio.CancelledError):
        await episode
    assert script.num_open == 0


async def test_cancelling_stops_the_tool(run: Run, tmp_path: Path) -> None:
    fifo = make_fifo(tmp_path)
    episode = run(Script([write_call("hang", {"fifo": str(fifo)})]))
    pids = await read_pids(fifo)
    episode.cancel()
    with pytest.raises(asyncio.CancelledError):
        await episode
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_files_of_a_task_that_was_cancelled_are_removed(run: Run, tmp_path: Path, state: ToolState) -> None:
    fifo = make_fifo(tmp_path)
    put, hang = write_call("put", {"item": "mug"}), write_call("hang", {"fifo": str(fifo)})
    for lines in ([put + hang], [put, hang]):
        episode = run(Script(lines))
        await read_pids(fifo)
        assert list(state.root.rglob("mug"))
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
        assert not list(state.root.rglob("mug"))


async def test_a_context_that_overflows_ends_a_begun_episode_and_refuses_a_new_one(run: Run) -> None:
    result = await run(Script([ADD, "overflow"]))
    assert (result.outcome, result.reason, result.num_steps) == ("max_tokens", "too long", 1)
    with pytest.raises(ContextOverflowError):
        await run(Script(["overflow"]))


@pytest.mark.parametrize("finish_reason", [None, "cancelled"])
async def test_an_engine_that_stops_in_a_step_raises(run: Run, finish_reason: FinishReason | None) -> None:
    with pytest.raises(EngineDeadError):
        await run(Script(["3"], finish_reason))


async def test_practice_refuses_external_tools(executor: ToolExecutor, state: ToolState) -> None:
    call = write_call("send_mail", {"to": "anna"})
    async with open_tools(APP, APP_REF, num_workers=1, purpose="practice") as tools:
        practice = await execute(call, state, tools)
    assert practice.failure == "refused"
    live = await execute(call, state, executor)
    assert (live.failure, live.observations[0].parts[0].content) == ("", "sent to anna")  # type: ignore[union-attr]


async def test_practice_asks_the_simulator_in_a_fork_and_live_calls_never_do(
    executor: ToolExecutor, state: ToolState
) -> None:
    call = write_call("post", {"text": "hello"})
    live = await execute(call, state, executor)
    assert live.observations == (
        chat.tool_result(ToolCall("call_0", "post", '{"text": "hello"}'), "really posted hello"),
    )
    async with open_tools(APP, APP_REF, num_workers=1, purpose="practice") as tools:
        assert tools.tools == APP.specs, "the model is shown the same tools"
        done = await execute(call * 2, state, tools)
        again = await execute(call, state, tools)
        malformed = await execute(write_call("post", {"text": 1}), state, tools)
    results = [message.parts[0] for message in done.observations]
    assert [(r.content, r.simulated) for r in results] == [("posted 1", True), ("posted 2", True)]  # type: ignore[union-attr]
    assert [message.parts[0].content for message in again.observations] == ["posted 1"]  # type: ignore[union-attr]
    assert done.state.workspace is not None
    assert done.state.workspace != (again.state.workspace or None)
    assert malformed.failure == "schema"
    assert not malformed.observations[0].parts[0].simulated, "nobody was asked"  # type: ignore[union-attr]


async def echo(call: ToolCall) -> ClientAnswer:
    content = call.arguments * 1000
    return ClientAnswer(ToolResult(call.id, call.name, content, is_error="fail" in call.arguments))


async def test_the_client_runs_its_own_tools_and_the_workers_theirs(executor: ToolExecutor, state: ToolState) -> None:
    routed = RoutingExecutor(executor, ClientExecutor([ECHO], echo, max_output_chars=10))
    assert routed.tools == (*APP.specs, ECHO)
    done = await execute(ADD + write_call("echo", {"text": "a"}), state, routed)
    assert [m.parts[0].content for m in done.observations] == [  # type: ignore[union-attr]
        "3",
        '{"text": "\n[truncated: 10 of 13000 characters]',
    ]
    assert done.failure == ""
    failed = await execute(write_call("echo", {"text": "fail"}), state, routed)
    assert failed.failure == "execution"
    wrong = await execute(write_call("echo", {"text": 1}), state, routed)
    assert wrong.failure == "schema"
    assert (await execute(write_call("fly", {}), state, routed)).failure == "schema"


async def test_a_client_that_does_not_answer_is_an_observation(state: ToolState) -> None:
    async def never(call: ToolCall) -> ClientAnswer:
        await asyncio.Event().wait()
        raise AssertionError

    done = await execute(write_call("echo", {}), state, ClientExecutor([ECHO], never, timeout_s=0.01))
    assert done.failure == "execution"
    assert "the client did not answer within 0.01 s" in done.observations[0].parts[0].content  # type: ignore[union-attr]


async def test_client_tools_that_clash_or_have_a_wrong_schema_are_refused(executor: ToolExecutor) -> None:
    with pytest.raises(InvalidRequestError, match="from the client and from the client"):
        ClientExecutor([ECHO, ECHO], echo)
    with pytest.raises(InvalidRequestError, match="from the application and from the client"):
        RoutingExecutor(executor, ClientExecutor([ToolSpec("add", "", '{"type": "object"}')], echo))
    with pytest.raises(InvalidRequestError, match="the schema of tool 'echo' is wrong") as raised:
        ClientExecutor([ToolSpec("echo", "", '{"type": "array"}')], echo)
    assert raised.value.field == "start.client_tools[0].parameters_json"


async def test_many_episodes_at_a_time_leave_nothing(tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        root = tmp_path / "states"
        async with open_tools(APP, APP_REF) as tools:
            lines = [write_call("put", {"item": "mug"}), write_call("crash", {"how": "exit"}), ADD, "3"]
            episodes = [Episode((chat.user("?"),), ToolState.initial(APP, root)) for _ in range(32)]
            results = await asyncio.gather(*(run_episode(e, LiveActor(Script(lines), tools)) for e in episodes))
        assert all((r.outcome, r.answer, r.num_tool_errors) == ("answered", "3", 1) for r in results)
        for result in results:
            result.state.discard()
        root.rmdir()
