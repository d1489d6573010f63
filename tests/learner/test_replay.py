"""Pairs of earlier cycles: which come back, how many, and that the trainer's file has them behind the fresh ones."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nightschool import AsyncClient
from nightschool_learner import records
from nightschool_learner.explore import ExploreStage
from nightschool_learner.pairs import PairsStage
from nightschool_learner.records import stage_counts
from nightschool_learner.replay import Ground, choose, earlier_cycles, num_replayed, replayed_rows
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import Cycle
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import canonical_json
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.harness import server_thread
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on
from tests.server.scripted_engine import ScriptedEngine

MUG = write_call("price", {"item": "mug"})
SCRIPTED = {"base_model_digest": "0" * 64, "chat_template_digest": "1" * 64}


def row(name: str, **fields: Any) -> dict[str, Any]:
    told = [{"role": "user", "content": name}]
    said = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
    return {"pair_id": name, "prompt": told, "images": [], **said, **fields}


def test_a_share_is_of_all_that_is_trained_on() -> None:
    assert [num_replayed(80, share) for share in (0.0, 0.2, 0.5)] == [0, 20, 80]
    assert num_replayed(10, 0.25) == 3


def test_the_newest_come_first_each_once_and_none_that_is_fresh() -> None:
    earlier = [("cycle_3", [row("x"), row("y")]), ("cycle_2", [row("y"), *(row(f"{n}") for n in range(9))])]
    chosen = choose(iter(earlier), [row("x")], 4, seed=7)
    assert (chosen[0]["pair_id"], chosen[0]["replayed_from"]) == ("y", "cycle_3")
    assert {each["replayed_from"] for each in chosen[1:]} == {"cycle_2"}
    assert "y" not in {each["pair_id"] for each in chosen[1:]}
    assert chosen == choose(iter(earlier), [row("x")], 4, seed=7)
    assert chosen != choose(iter(earlier), [row("x")], 4, seed=8)
    assert len(choose(iter(earlier), [], 99, seed=7)) == 11


def end(store: Store, cycle: Cycle, state: str = "promoted", **manifest: str) -> str:
    """End a cycle with a candidate of this manifest."""
    name = f"{len(store.query('SELECT 1 FROM adapters')) + 1}-abc"
    facts = canonical_json({**SCRIPTED, **manifest})
    with store.transaction() as db:
        db.execute(
            "INSERT INTO adapters (name, sequence, digest, state, parent, cycle_id, rank, alpha, target_modules, "
            "size_bytes, manifest, created_at) VALUES (?, ?, '', 'active', 'base', ?, 1, 1, '', 1, ?, ?)",
            (name, int(name.partition("-")[0]), cycle.id, facts, time.time()),
        )
        db.execute(
            "UPDATE cycles SET state = ?, candidate = ?, ended_at = ? WHERE id = ?",
            (state, name, time.time(), cycle.id),
        )
    return cycle.id


def test_only_cycles_on_the_same_ground_come_back(tmp_path: Path) -> None:
    store = Store.open(Home(tmp_path))
    proven = end(store, cycle_on(store))
    rejected = end(store, cycle_on(store), "rejected")
    end(store, cycle_on(store), base_model_digest="other")
    end(store, cycle_on(store), chat_template_digest="other")
    end(store, cycle_on(store, "critic.margin_nats=3"))
    sabotaged = end(store, cycle_on(store))
    with store.transaction() as db:
        changed = "json_set(config, '$.fault_injection.invert_critic', json('true'))"
        db.execute(f"UPDATE cycles SET config = {changed} WHERE id = ?", (sabotaged,))
    newest = end(store, cycle_on(store))
    now = cycle_on(store)
    critic = canonical_json(now.config.critic.model_dump(mode="json"))
    ground = Ground(SCRIPTED["base_model_digest"], SCRIPTED["chat_template_digest"], critic, frozenset())
    assert earlier_cycles(store, now.id, ground, unproven=False) == [newest, proven]
    assert earlier_cycles(store, now.id, ground, unproven=True) == [newest, sabotaged, rejected, proven]
    stricter = with_overrides(LearnerConfig(), ["critic.margin_nats=3"]).critic.model_dump(mode="json")
    others = replace(ground, critic=canonical_json(stricter))
    assert len(earlier_cycles(store, now.id, others, unproven=False)) == 1


def test_a_rubric_that_is_not_used_any_more_does_not_come_back() -> None:
    now = Ground("m", "t", "{}", frozenset({"step-1:aa", "step-1:bb"}))
    assert now.carries(replace(now, rubrics=frozenset({"step-1:aa"})))
    assert now.carries(replace(now, rubrics=frozenset()))
    assert not now.carries(replace(now, rubrics=frozenset({"step-1:aa", "step-0:cc"})))
    assert not now.carries(replace(now, base_model_digest="n"))


def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
    asked = prompt.messages[1].text
    if prompt.messages[-1].role == "tool":
        return asked if sampling.n == 1 else [f"{asked} coins", "?", asked, asked][index]
    return MUG


async def practised(cycle: Cycle, *prompts: str) -> Cycle:
    """Explore these tasks and make pairs of them."""
    with cycle.store.transaction() as db:
        for slot, prompt in enumerate(prompts):
            insert_task(db, cycle.id, new_task(slot, prompt, (), KEPT), [], [])
    await ExploreStage(lambda cycle: FakeSampler(answer), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    await PairsStage().run(cycle)
    return cycle


def pairs_in(cycle: Cycle) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cycle.folder / "pairs.jsonl").read_text().splitlines()]


async def test_a_night_trains_on_pairs_of_the_night_before(tmp_path: Path) -> None:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    with server_thread(tmp_path / "home", {"agent.app": "tests.learner.practice_app:app"}, start) as server:
        store = Store.open(Home(server.home), migrate=False)
        first = await practised(cycle_on(store, "pairs.min_pairs=1"), "one", "two")
        end(store, first)
        async with AsyncClient(server.address, home=server.home) as client:
            waiting = cycle_on(store, "pairs.min_pairs=1", "pairs.replay_share=0.5")
            second = await practised(replace(waiting, client=client), "two", "three")
            rows = pairs_in(second)
            fresh = [row for row in rows if "replayed_from" not in row]
            replayed = [row for row in rows if "replayed_from" in row]
            made_by_first = pairs_in(first)
            assert len(fresh) == len(made_by_first)
            assert rows == [*fresh, *replayed]
            assert replayed == [
                {**row, "replayed_from": first.id} for row in replayed_order(made_by_first, replayed)
            ], "as the first night's trainer read them"
            assert {row["prompt"][1]["content"] for row in replayed} == {"one"}, "what is made anew is not replayed"
            assert stage_counts(store, second.id, "pairs")["replayed"] == len(replayed) > 0
            assert await replayed_rows(replace(second, client=client), fresh) == replayed, "the stage may run again"
            with store.transaction() as db:
                db.execute("DELETE FROM pairs WHERE cycle_id = ?", (first.id,))
            assert await replayed_rows(replace(second, client=client), fresh) == [], "a pair that was erased stays so"
        store.close()


def replayed_order(rows: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were replayed, in the order in which they were."""
    by_id = {row["pair_id"]: row for row in rows}
    return [by_id[row["pair_id"]] for row in replayed]


async def test_without_a_share_nobody_is_asked(tmp_path: Path) -> None:
    store = Store.open(Home(tmp_path))
    cycle = await practised(cycle_on(store, "pairs.min_pairs=1"), "one")  # its client is not connected
    assert all("replayed_from" not in row for row in pairs_in(cycle))
    assert records.stage_counts(store, cycle.id, "pairs").get("replayed") is None


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_a_share_must_leave_something_fresh(share: str) -> None:
    from nightschool_server.errors import ConfigError

    with pytest.raises(ConfigError, match="replay_share"):
        with_overrides(LearnerConfig(), [f"pairs.replay_share={share}"])
