"""Comparisons behind the rows: a listwise judge in exploration, a spent budget, and duels of earlier schemas."""

from __future__ import annotations

import sqlite3
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner import records
from nightschool_learner.critics import Judge
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.pairs import pairs_of
from nightschool_learner.practice_records import decided_steps
from nightschool_learner.roles import Model
from nightschool_learner.verdict_cache import VerdictCache
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store import migrations
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeSampler, open_home
from tests.learner.test_critics import Says, better, letter_of
from tests.learner.test_explore import with_tasks
from tests.server.freeze_schema import frozen


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def three_answers(prompt: Prompt, sampling: Sampling, index: int) -> str:
    return "one" if sampling.n == 1 else ["two", "three", "one", "two"][index]


def explores(judge: Judge) -> ExploreStage:
    return ExploreStage(lambda cycle: FakeSampler(three_answers), lambda cycle, _: nullcontext(judge))


async def test_a_listwise_judge_sees_a_step_at_once_and_makes_pairs_with_every_rival(store: Store) -> None:
    overrides = ("critic.protocol=listwise", "critic.rubric=step-2")
    cycle = with_tasks(store, "What is a mug?", overrides=overrides)
    says = Says(lambda asked, _: better(letter_of(asked, "three"), 0.8))
    cache = VerdictCache(store, cycle.id)
    judge = Judge(Model(says, "", "judge", False, False), cycle.config.critic, cache, cache.spent())
    await explores(judge).run(cycle)
    assert len(says.seen) == 4, "four orders, whatever the number of rivals"
    [row] = store.query("SELECT COUNT(*) AS n, SUM(prompt_tokens) AS tokens, MIN(num_votes) AS votes FROM critiques")
    assert row == {"n": 6, "tokens": 400, "votes": 2}
    [step] = decided_steps(store, cycle.id)
    assert [c.text for c in step.candidates if c.position == step.step.picked] == ["three"]
    assert len(pairs_of(step)) == 2
    counts = records.stage_counts(store, cycle.id, "critique") | cycle.progress("critique").counts
    assert sum(value for key, value in counts.items() if key.startswith("ranked_best_at_")) == counts["rankings"] == 4
    assert {row["rubric"] for row in store.query("SELECT rubric FROM critiques")} == {judge.rubric}


async def test_a_spent_budget_leaves_the_rest_to_facts_and_says_so(store: Store) -> None:
    prompts = [f"What is mug {i}?" for i in range(4)]
    cycle = with_tasks(store, *prompts, overrides=("critic.max_comparisons=4", "critic.min_gold=1000"))
    says = Says(lambda asked, _: better("A" if "three" in asked.split("B:\n")[0] else "B"))
    cache = VerdictCache(store, cycle.id)
    judge = Judge(Model(says, "", "judge", False, False), cycle.config.critic, cache, cache.spent())
    await explores(judge).run(cycle)
    assert len(says.seen) == 4
    progress = cycle.progress("critique")
    assert progress.counts["abstained_budget"] >= 1
    assert "budget is spent" in progress.message
    await CritiqueStage().run(cycle)
    assert records.stage_counts(store, cycle.id, "critique")["abstained_budget"] >= 1
    assert store.query("SELECT DISTINCT abstention FROM steps WHERE picked_by = 'fallback'") != []


def test_comparisons_of_an_earlier_schema_become_duels_of_the_judge() -> None:
    known = migrations.all_migrations()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(frozen(4).read_text())
    connection.execute(
        "INSERT INTO critiques (id, step_id, first, second, verdict, margin, raw, prompt_tokens, created_at) "
        "VALUES ('crit_2', 'step_1', 1, 0, 'second', -1.5, '', 9, 2.0)"
    )
    migrations.migrate(connection, known)
    duels = connection.execute("SELECT step_id, a, b, winner, why, margin, component FROM duels").fetchall()
    assert duels == [("step_1", 0, 1, 0, "", 1.5, "judge")]
