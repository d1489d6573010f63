"""How many samples a step takes, at which temperatures, and when it stops asking."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import practice_counts, records, seed_records
from nightschool_learner.explore import ExploreStage
from nightschool_learner.practice_counts import PositionFigures
from nightschool_learner.rounds import Group, rounds_of
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.config.practice import ExploreConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ConfigError
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, log_request, open_home, without_clocks

MUG, LAMP = (write_call("price", {"item": item}) for item in ("mug", "lamp"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def with_task(store: Store, *overrides: str) -> Cycle:
    cycle = cycle_on(store, *overrides)
    log_request(store, "seed", "What does one mug cost?")
    with store.transaction() as db:
        seed_records.insert_task(db, cycle.id, seed_records.new_task(0, "What is a mug?", (), KEPT), [], [])
    return cycle


async def explored(cycle: Cycle, sampler: FakeSampler) -> None:
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(cycle)


def asked(sampler: FakeSampler) -> list[tuple[float, int]]:
    return [(sampling.temperature, sampling.n) for _, sampling, _ in sampler.calls]


def by_stream(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """An answer, or one of two calls, as the sample's stream has it, whichever call asks for it."""
    assert sampling.seed is not None
    if prompt.messages[-1].role == "tool":
        return "12" if (sampling.seed + index) % 3 else "It is 12"
    return [MUG, MUG, LAMP][(sampling.seed + index) % 3]


def actions(store: Store) -> list[tuple[int, int, str, int]]:
    return [
        tuple(row.values())
        for row in store.query(
            "SELECT s.position, c.position AS at, c.text, c.num_samples FROM candidates c "
            "JOIN steps s ON s.id = c.step_id ORDER BY s.position, c.position"
        )
    ]  # type: ignore[misc]


def test_one_cold_and_the_others_hot_is_one_round_of_two_calls() -> None:
    [groups] = rounds_of(ExploreConfig(cold_temperature=0.7, hot_temperature=1.2))
    assert groups == [Group("cold", 0.7, (0,), 0), Group("hot", 1.2, (1, 2, 3, 4), 0)]


def test_equal_temperatures_share_a_call_and_keep_their_places() -> None:
    [groups] = rounds_of(ExploreConfig(num_candidates=4, temperatures=(0.5, 1.2, 0.5, 0.9)))
    assert groups == [Group("0.5", 0.5, (0, 2), 0), Group("1.2", 1.2, (1,), 0), Group("0.9", 0.9, (3,), 0)]


def test_a_second_round_goes_on_in_the_streams_of_the_first() -> None:
    first, second = rounds_of(ExploreConfig(adaptive_after=3))
    assert [(group.kind, group.positions, group.num_before) for group in first] == [
        ("cold", (0,), 0),
        ("hot", (1, 2), 0),
    ]
    assert [(group.kind, group.positions, group.num_before) for group in second] == [("hot", (3, 4), 2)]


def test_temperatures_that_are_not_one_for_each_candidate_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperatures names 2 and num_candidates is 5: name one for each candidate"):
        with_overrides(LearnerConfig(), ["explore.temperatures=[0.5, 1.0]"])
    fits = with_overrides(LearnerConfig(), ["explore.temperatures=[0.5, 1.0]", "explore.num_candidates=2"])
    assert fits.explore.temperatures == (0.5, 1.0)


@pytest.mark.parametrize("after", [1, 5, 6])
def test_looking_after_one_sample_or_after_all_of_them_is_refused(after: int) -> None:
    with pytest.raises(ConfigError, match=f"adaptive_after is {after}; it must be 0, or at least 2 and less than"):
        with_overrides(LearnerConfig(), [f"explore.adaptive_after={after}"])


async def test_every_temperature_is_sampled_and_candidates_stand_in_the_order_of_the_list(store: Store) -> None:
    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return f"{sampling.temperature:g} {index}"

    sampler = FakeSampler(said)
    await explored(with_task(store, "explore.num_candidates=4", "explore.temperatures=[0.5, 1.2, 0.5, 0.9]"), sampler)
    assert asked(sampler) == [(0.5, 2), (1.2, 1), (0.9, 1)]
    assert [text for _, _, text, _ in actions(store)] == ["0.5 0", "1.2 0", "0.5 1", "0.9 0"]


async def test_a_step_on_whose_action_the_first_samples_agree_takes_no_more(store: Store) -> None:
    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if prompt.messages[-1].role != "tool":
            return MUG
        return "12" if sampling.n == 1 else ["It is 12", "12"][index]

    sampler = FakeSampler(said)
    cycle = with_task(store, "explore.adaptive_after=3")
    await explored(cycle, sampler)
    assert asked(sampler) == [(0.7, 1), (1.2, 2), (0.7, 1), (1.2, 2), (1.2, 2)]
    assert actions(store) == [(0, 0, MUG, 3), (1, 0, "12", 3), (1, 1, "It is 12", 2)]
    assert store.query("SELECT picked_by FROM steps ORDER BY position")[0] == {"picked_by": "agreed"}


async def test_first_samples_that_agree_on_an_action_that_failed_are_asked_on(store: Store) -> None:
    missing = write_call("price", {"item": "none"})

    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if prompt.messages[-1].role == "tool":
            return "12"
        return MUG if sampling.n == 3 else missing

    sampler = FakeSampler(said)
    await explored(with_task(store, "explore.adaptive_after=2"), sampler)
    assert asked(sampler)[:3] == [(0.7, 1), (1.2, 1), (1.2, 3)]
    assert actions(store)[:2] == [(0, 0, missing, 2), (0, 1, MUG, 3)]
    assert store.query("SELECT picked, picked_by FROM steps ORDER BY position")[0] == {
        "picked": 1,
        "picked_by": "facts",
    }


async def test_a_step_that_is_asked_on_is_the_one_that_it_would_have_been_at_once(store: Store) -> None:
    whole = open_home(store.home.path / "whole")
    await explored(with_task(whole), FakeSampler(by_stream))
    await explored(with_task(store, "explore.adaptive_after=2"), FakeSampler(by_stream))
    disagreeing = {row["position"] for row in store.query("SELECT DISTINCT s.position FROM candidates c JOIN steps s "
                   "ON s.id = c.step_id WHERE c.position > 0")}  # fmt: skip
    assert disagreeing
    assert [row for row in actions(store) if row[0] in disagreeing] == [
        row for row in actions(whole) if row[0] in disagreeing
    ]


async def test_a_step_says_what_it_took_and_positions_say_how_much_was_different(store: Store) -> None:
    def said(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if prompt.messages[-1].role != "tool":
            return MUG
        return "12" if sampling.n == 1 else ["It is 12", "12", "12", "12"][index]

    cycle = with_task(store)
    await explored(cycle, FakeSampler(said))
    assert practice_counts.position_figures(store, cycle.id) == (
        PositionFigures(0, num_steps=1, num_samples=5, num_actions=1, unique_rate=0.2),
        PositionFigures(1, num_steps=1, num_samples=5, num_actions=2, unique_rate=0.4),
    )
    took = store.query("SELECT num_tokens, num_calls FROM steps ORDER BY position")
    assert took == [{"num_tokens": 5 * len(MUG), "num_calls": 1}, {"num_tokens": 4 * 2 + 8, "num_calls": 0}]
    cycle.progress("explore").flush()
    shown = records.stage_counts(store, cycle.id, "explore")
    assert without_clocks(shown) == practice_counts.explore_counts(store, cycle.id)
    assert (shown["samples_at_2"], shown["actions_at_2"], shown["tokens"]) == (5, 2, 5 * len(MUG) + 16)
