"""What `nightschool cycles show` says of practice, and what a line of progress leaves out."""

from __future__ import annotations

import dataclasses

import pytest
from nightschool import Cycle, Stage, StageState, TaskFamily
from nightschool.cli.cycles import write_cycle
from nightschool.cli.practice import practice_fields
from nightschool.cli.watch import line_of
from nightschool.convert import from_proto

from tests.client.fake_replies import cycle

EXPLORE = {
    "samples": 200, "distinct_actions": 50, "samples_at_1": 100, "actions_at_1": 20, "samples_at_2": 100,
    "actions_at_2": 30, "wall_ms": 40_000, "watched_ms": 38_000, "busy_ms": 34_200, "asking_ms": 39_600,
}  # fmt: skip
CRITIQUE = {"prompt_tokens": 8000, "completion_tokens": 400, "duels_ms": 21_000}


def stage(name: str, num_done: int = 0, **counts: int) -> Stage:
    return Stage(name, StageState.DONE, num_done, 0, None, None, 0.0, 0.0, counts, "")


def cycle_of(*stages: Stage) -> Cycle:
    return dataclasses.replace(from_proto(Cycle, cycle()), stages=stages)


def test_a_cycle_says_how_much_was_different_how_busy_the_engine_was_and_what_a_pair_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = cycle_of(stage("explore", **EXPLORE), stage("critique", **CRITIQUE), stage("pairs", num_done=42))
    assert list(practice_fields(shown)) == [
        ("different actions", "25% of 200 samples; by step 20%, 30%"),
        ("engine busy", "90% of 40s of practice, waited for 99%"),
        ("critic's cost", "200 tokens and 0.5 s a pair"),
    ]
    write_cycle(shown)
    assert "engine busy        90% of 40s of practice, waited for 99%\n" in capsys.readouterr().out


def test_a_cycle_that_has_not_practised_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    early = cycle_of(stage("seeds"), stage("explore"))
    assert [value for _, value in practice_fields(early)] == ["", "", ""]
    write_cycle(early)
    assert "engine busy" not in capsys.readouterr().out


def test_families_of_tasks_stand_below_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    families = (TaskFamily("add+look_up/text", 30, 0.5, 12), TaskFamily("none/image", 4, 1.0, 0))
    write_cycle(dataclasses.replace(cycle_of(stage("explore")), task_families=families))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["add+look_up/text", "30", "50%", "12"] in lines
    assert ["none/image", "4", "100%", "0"] in lines
    write_cycle(cycle_of(stage("explore")))
    assert "family of tasks" not in capsys.readouterr().out


def test_a_line_of_progress_leaves_out_what_is_read_together_at_the_end() -> None:
    assert line_of(stage("explore", **EXPLORE)) == "explore    done    distinct_actions=50 samples=200"
