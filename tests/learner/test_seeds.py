"""Which live requests become seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.records import stage_counts
from nightschool_learner.screening import HeldOut, task_key
from nightschool_learner.seed_records import LoggedRequest, seeds_of
from nightschool_learner.seeds import SeedsStage, choose_seeds, is_reserved
from nightschool_server.config.practice import SeedsConfig

from tests.learner.practice_home import cycle_on, dump, log_request, open_home

CONFIG = SeedsConfig()
NOTHING = HeldOut(())


def request(name: str, prompt: str = "", **changes: object) -> LoggedRequest:
    plain = LoggedRequest(name, "", prompt or f"task {name}", (), 1, 0, False, None, None)
    return replace(plain, **changes)  # type: ignore[arg-type]


def ids(requests: list[LoggedRequest], config: SeedsConfig = CONFIG, held_out: HeldOut = NOTHING) -> list[str]:
    return [seed.response_id for seed in choose_seeds(requests, held_out, config).seeds]


def test_failures_come_first_bad_feedback_before_tool_errors() -> None:
    requests = [
        request("plain"),
        request("endless", is_unfinished=True),
        request("error", num_tool_errors=2),
        request("thumb", good=False),
        request("score", score=0.2),
        request("liked", good=True, score=0.9),
    ]
    assert ids(requests) == ["thumb", "score", "error", "endless", "plain", "liked"]


def test_only_the_configured_number_is_kept() -> None:
    requests = [request(str(i)) for i in range(5)] + [request("bad", good=False)]
    chosen = choose_seeds(requests, NOTHING, SeedsConfig(max_seeds=2))
    assert [seed.response_id for seed in chosen.seeds] == ["bad", "0"]
    assert chosen.dropped == {"over_max": 4}


def test_the_same_task_is_one_seed_and_the_failing_request_stands_for_it() -> None:
    requests = [
        request("a", "What is one mug?"),
        request("b", "what is ONE mug", good=False),
        request("c", "what is one mug"),
    ]
    chosen = choose_seeds(requests, NOTHING, CONFIG)
    assert [(seed.response_id, seed.why) for seed in chosen.seeds] == [("b", "feedback")]
    assert chosen.dropped == {"duplicate": 2}


def test_the_same_words_about_another_picture_are_another_seed() -> None:
    assert len(ids([request("a", "count", images=("x",)), request("b", "count", images=("y",))])) == 2


def test_held_out_tasks_are_never_seeds() -> None:
    held_out = HeldOut([task_key("What does one lamp cost?"), task_key("Count the dots", ["pic"])])
    requests = [request("a", "what does one lamp cost"), request("b", "Any words", images=("pic",)), request("c")]
    assert ids(requests, held_out=held_out) == ["c"]


def test_conversations_of_several_turns_and_empty_ones_are_not_seeds() -> None:
    assert (
        ids([request("a", num_user_turns=2), request("b", num_user_turns=0), replace(request("c"), prompt=" ")]) == []
    )


def test_reserved_sessions_are_a_fixed_share_and_never_seeds() -> None:
    names = [f"session-{i}" for i in range(2000)]
    reserved = {name for name in names if is_reserved(name, 0.25)}
    assert 400 < len(reserved) < 600
    assert not is_reserved("", 0.25)
    assert not any(is_reserved(name, 0.0) for name in names)
    requests = [request(name, session_id=name) for name in names]
    config = SeedsConfig(reserved_session_share=0.25, max_seeds=2000)
    assert set(ids(requests, config)) == set(names) - reserved


async def test_the_stage_writes_the_choice_once(tmp_path: Path) -> None:
    store = open_home(tmp_path)
    for index in range(4):
        log_request(store, f"train{index}", f"Sell {index} lamps", images=["c" * 64])
    log_request(store, "held", "What does one mug cost for Zoe?")
    log_request(store, "secret", "Sell 9 lamps", policy="log_only")
    log_request(store, "gone", "Sell 8 lamps", policy="no_log")
    cycle = cycle_on(store, "seeds.min_seeds=4")
    await SeedsStage().run(cycle)
    chosen = seeds_of(store, cycle.id)
    assert [seed.response_id for seed in chosen] == ["resp_train3", "resp_train2", "resp_train1", "resp_train0"]
    assert chosen[0].images == ("c" * 64,)
    assert stage_counts(store, cycle.id, "seeds") == {"chosen": 4, "traffic": 4, "dropped_held_out": 1}
    before = dump(store, "cycle_seeds")
    log_request(store, "late", "Sell 77 lamps")
    await SeedsStage().run(cycle)
    assert dump(store, "cycle_seeds") == before


async def test_too_few_seeds_end_the_cycle(tmp_path: Path) -> None:
    store = open_home(tmp_path)
    log_request(store, "one", "Sell a lamp")
    with pytest.raises(NothingToLearnError, match="1 seed requests, fewer than"):
        await SeedsStage().run(cycle_on(store))
