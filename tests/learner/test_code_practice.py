"""Practice with code actions: forks with variables, equal code as one candidate, and a resumed rollout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.explore import ExploreStage
from nightschool_learner.pairs import pairs_of
from nightschool_learner.practice_records import steps_picked_by
from nightschool_learner.stages import Cycle
from nightschool_server.agent.code import CodeFormat
from nightschool_server.chat import ToolResult
from nightschool_server.config.serving import AgentConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.learner.practice_home import DiedError, FakeCritic, FakeSampler, dump, open_home
from tests.learner.test_explore import ROWS, with_tasks
from tests.server.sandboxes import needs_sandbox

pytestmark = needs_sandbox


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """Two steps: five candidates that each set x to something else, two of them alike; then an answer with x."""
    assert prompt.tools == ()
    if any(isinstance(part, ToolResult) for message in prompt.messages for part in message.parts):
        return block("final_answer(x)") if sampling.n == 1 else block(f"final_answer(x + {index})")
    if sampling.n == 1:
        return block("x = price('mug')")
    return [
        block("x = price('mug')  # the same"), block("x = price('mug') * 1000000"), block("x = price('none')"), "12"
    ][index]  # fmt: skip


def coded(cycle: Cycle) -> Cycle:
    return replace(cycle, agent=AgentConfig(action_format="code"))


def stage(sampler: FakeSampler) -> ExploreStage:
    return ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic()))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


async def test_candidates_of_code_have_variables_of_their_own_and_the_pick_goes_on_with_its(store: Store) -> None:
    cycle = coded(with_tasks(store, "What is a mug?"))
    await stage(FakeSampler(answer)).run(cycle)
    first = store.query(
        "SELECT c.num_samples, c.failure, c.observation FROM candidates c JOIN steps s ON s.id = c.step_id "
        "WHERE s.position = 0 ORDER BY c.position"
    )
    assert [(row["num_samples"], row["failure"]) for row in first] == [(2, ""), (1, ""), (1, "execution"), (1, "parse")]
    assert "no item is called 'none' (line 1: x = price('none'))" in first[2]["observation"]
    assert "the step holds no action" in first[3]["observation"]
    [rollout] = store.query("SELECT outcome, answer FROM rollouts")
    assert rollout["outcome"] == "answered"
    assert int(rollout["answer"]) >= 12_000_000, "the critic picked the longest, and x is its"
    tools = {p.tool for step in steps_picked_by(store, cycle.id, ("critic",)) for p in pairs_of(step, CodeFormat())}
    assert "price" in tools
    assert not list(store.home.cycles.glob("*/workspaces/*"))


async def test_a_killed_rollout_of_code_goes_on_with_the_variables_that_it_had(tmp_path: Path) -> None:
    whole = open_home(tmp_path / "whole")
    await stage(FakeSampler(answer)).run(coded(with_tasks(whole, "What is a mug?")))
    broken = open_home(tmp_path / "broken")
    cycle = coded(with_tasks(broken, "What is a mug?"))
    with pytest.raises(DiedError):
        await stage(FakeSampler(answer, die_at=2)).run(cycle)
    await stage(FakeSampler(answer)).run(coded(with_tasks(broken, "What is a mug?")))
    key: Callable[[Store], object] = lambda store: [  # noqa: E731
        store.query("SELECT answer, outcome FROM rollouts"),
        store.query("SELECT text, observation, failure FROM candidates ORDER BY text"),
    ]
    assert key(whole) == key(broken)
    assert all(dump(broken, table) for table in ROWS)
