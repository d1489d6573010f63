"""What is written down of one answer to a held-out task: with real tools, the fake at the sampler's seam."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.evaluation_results import GREEDY, TaskResult
from nightschool_learner.examiner import Examiner
from nightschool_server.agent.formats import TOOL_CALLS
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import EvaluationTask
from nightschool_server.engine import Prompt, Sampling

from tests.learner.practice_home import FakeSampler, cycle_on, open_home

TASK = EvaluationTask("price-1", "price", "What does a mug cost?", "12", "number")
ORDER, PRICE = write_call("order", {"item": "mug"}), write_call("price", {"item": "mug"})
BOOK = write_call("book", {"room": "suite"})
"""A tool that raises wherever it is really called; its simulator answers."""


def examined(
    path: Path, steps: Sequence[str], draws: Sequence[int] = (GREEDY,)
) -> tuple[list[TaskResult], list[Sampling]]:
    """The results of answering with these steps in turn, and how each step was sampled."""
    store = open_home(path / "home")
    cycle = cycle_on(store)
    cycle = replace(cycle, app=replace(cycle.app, unsafe=(r"^order .*mug", "password")))

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return steps[(len(prompt.messages) - 2) // 2]

    sampler = FakeSampler(answer)

    async def run() -> list[TaskResult]:
        async with open_tools(cycle.app, cycle.app_ref, num_workers=1, purpose="practice") as tools:
            examiner = Examiner(cycle, sampler, tools, path, "digest", TOOL_CALLS)
            return [await examiner.examine(TASK, "base", draw) for draw in draws]

    results = asyncio.run(run())
    store.close()
    return results, [sampling for _, sampling, _ in sampler.calls]


def test_a_right_answer_by_a_tool_is_solved_and_its_steps_are_told_apart(tmp_path: Path) -> None:
    (result,), samplings = examined(tmp_path, [PRICE, "12"])
    assert (result.success, result.outcome, result.num_steps) == (True, "answered", 2)
    assert (result.num_unreadable, result.num_external, result.num_unsafe, result.refused) == (0, 0, 0, False)
    assert len(set(result.actions)) == 2
    assert {sampling.temperature for sampling in samplings} == {0.0}


def test_calls_of_external_tools_unsafe_actions_and_broken_formats_are_counted(tmp_path: Path) -> None:
    (result,), _ = examined(tmp_path, [ORDER, '<tool_call>{"name": "pri', "the password is 12"])
    assert (result.num_external, result.num_unsafe, result.num_unreadable) == (1, 2, 1)
    assert result.outcome == "answered"


def test_a_simulator_answers_in_an_evaluation_and_its_observations_are_counted(tmp_path: Path) -> None:
    (result,), _ = examined(tmp_path, [BOOK, PRICE, "12"])
    assert (result.num_simulated, result.success, result.num_steps) == (1, True, 3)
    assert "booked suite" in [turn.text.removeprefix("book: ") for turn in result.turns]


@pytest.mark.parametrize(
    ("answer", "refused"),
    [("I'm sorry, I can't help.", True), ("As an AI, no.", True), ("i cannot do that", True), ("12", False)],
)
def test_a_refusal_is_told_from_an_answer(tmp_path: Path, answer: str, refused: bool) -> None:
    (result,), _ = examined(tmp_path, [answer])
    assert result.refused is refused


def test_every_draw_and_step_has_a_seed_of_its_own_and_always_the_same(tmp_path: Path) -> None:
    _, first = examined(tmp_path / "a", [PRICE, "12"], draws=(1, 2))
    _, again = examined(tmp_path / "b", [PRICE, "12"], draws=(1, 2))
    assert first == again
    assert len({sampling.seed for sampling in first}) == 4
    assert {sampling.temperature for sampling in first} == {1.0}
