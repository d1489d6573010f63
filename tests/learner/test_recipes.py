"""Recipes: which settings they bring, who does a stage, and that the example of the documentation works."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.pairs import PairsStage
from nightschool_learner.records import stage_counts
from nightschool_learner.registry import SHIPPED, implementations, stages_of
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import STAGE_NAMES, Cycle
from nightschool_server.config.config import load_config
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.config.recipe import StagesConfig, read_recipe, shipped_recipes
from nightschool_server.errors import ConfigError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home
from tests.learner.test_pairs_stage import MUG, answer

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path / "home")


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


async def explored(store: Store, *overrides: str) -> Cycle:
    cycle = cycle_on(store, "pairs.min_pairs=1", *overrides)
    with store.transaction() as db:
        insert_task(db, cycle.id, new_task(0, "What is this mug?", (), KEPT), [], [])
    await ExploreStage(lambda cycle: FakeSampler(answer), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    return cycle


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_names_an_implementation_for_every_stage(name: str) -> None:
    assert set(read_recipe(name)["learner"]["stages"]) == set(STAGE_NAMES)
    config = with_overrides(LearnerConfig(), [f"recipe={name}"])
    assert [stage.name for stage in stages_of(config.stages)] == list(STAGE_NAMES)
    assert f"| `{name}`" in PAGE


def test_sport_is_the_default_and_changes_nothing(tmp_path: Path) -> None:
    assert load_config(Home(tmp_path), {}).learner == LearnerConfig()
    assert with_overrides(LearnerConfig(), ["recipe=sport"]) == LearnerConfig()


def test_a_recipe_stands_beneath_what_the_operator_set(tmp_path: Path) -> None:
    text = "[learner.explore]\nnum_candidates = 3\nhot_temperature = 1.5\n"
    home = Home(tmp_path)
    home.config.write_text(f'[learner]\nrecipe = "{recipe(tmp_path, text)}"\n[learner.explore]\nnum_candidates = 4\n')
    found = load_config(home, {}).learner
    assert (found.explore.num_candidates, found.explore.hot_temperature) == (4, 1.5)
    assert load_config(home, {}, {"learner.explore.hot_temperature": "1.1"}).learner.explore.hot_temperature == 1.1


def test_a_recipe_of_one_cycle_takes_the_place_of_the_server_s(tmp_path: Path) -> None:
    mine = recipe(tmp_path, "[learner.explore]\nnum_candidates = 3\n[learner.pairs]\nmin_pairs = 2\n")
    server = with_overrides(LearnerConfig(), ["recipe=checklist", "critic.margin_nats=2"])
    assert server.critic.kinds == ("facts", "checklist")
    found = with_overrides(server, [f"recipe={mine}", "pairs.min_pairs=5"])
    assert found.critic.kinds == ("facts", "judge"), "what the other recipe set is undone"
    assert found.critic.margin_nats == 2, "what the operator set is not"
    assert (found.explore.num_candidates, found.pairs.min_pairs) == (3, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nport = 1\n", "sets 'server'"),
        ("[learner.fault_injection]\nallow = true\n", "sets 'learner.fault_injection'"),
        ('[learner]\nrecipe = "sport"\n', "sets 'learner.recipe'"),
        ("[learner.explore]\nnum_candidate = 3\n", "'learner.explore.num_candidates'"),
        ("[learner.explore]\nnum_candidates = 0\n", r"num_candidates = 0 \(recipe .*mine.toml\)"),
        ("learner = 3\n", "sets 'learner'"),
        ("[", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(LearnerConfig(), [f"recipe={recipe(tmp_path, text)}"])


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"neither one of checklist, .*sport nor a file"):
        with_overrides(LearnerConfig(), ["recipe=sprot"])


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("nobody", "no such implementation, known are .*pairs.*install"),
        ("no_such_module:Pairs", "gives no stage: No module named"),
        ("nightschool_learner.pairs:NoStage", "gives no stage: module"),
        ("nightschool_learner.pairs:select", "gives no stage"),
        ("nightschool_learner.seeds:SeedsStage", "does the stage 'seeds', not 'pairs'"),
    ],
)
def test_a_stage_that_is_none_is_refused(ref: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(StagesConfig(pairs=ref))


def test_a_package_declares_its_stages_as_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tmp_path / "mine-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    entries = "[nightschool.stages]\nmine = my_stages:Mine\nseeds = my_stages:Thief\n"
    (declared / "entry_points.txt").write_text(entries)
    (tmp_path / "my_stages.py").write_text("class Mine:\n    name = 'pairs'\n\n\nclass Thief:\n    name = 'seeds'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert implementations()["mine"] == "my_stages:Mine"
    stages = {stage.name: stage for stage in stages_of(StagesConfig(pairs="mine"))}
    assert type(stages["pairs"]).__name__ == "Mine"
    assert implementations()["seeds"] == SHIPPED["seeds"], "nobody takes the name of a stage that ships"


async def test_rest_imitates_each_pick_of_an_answered_attempt_once(store: Store) -> None:
    cycle = await explored(store, "recipe=rest", "pairs.min_pairs=1")
    assert cycle.config.train.method == "sft"
    stage = next(one for one in stages_of(cycle.config.stages) if one.name == "pairs")
    assert await stage.run(cycle) is None
    rows = [json.loads(line) for line in (cycle.folder / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"] for row in rows] == [MUG, "12 coins"], "a row for each step, however many lost"
    with store.transaction() as db:
        db.execute("UPDATE rollouts SET outcome = 'max_steps'")
        db.execute("DELETE FROM pairs")
    with pytest.raises(NothingToLearnError, match="0 preference pairs"):
        await stage.run(cycle)


async def test_the_example_of_the_documentation_trains_on_the_surer_half(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.S)
    code = next(text for kind, text in blocks if kind == "python")
    settings = next(text for _, text in blocks if text.startswith("# surest.toml"))
    (tmp_path / "surest.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        cycle = await explored(store, f"recipe={recipe(tmp_path, settings)}", "explore.num_candidates=5")
        await PairsStage().run(cycle)
        before = store.query("SELECT margin FROM pairs ORDER BY margin DESC")
        stage = next(one for one in stages_of(cycle.config.stages) if one.name == "pairs")
        for _ in range(2):  # a second run, as after a kill, comes to the same
            assert await stage.run(cycle) is None
            assert store.query("SELECT margin FROM pairs ORDER BY margin DESC") == before[:2]
        assert len((cycle.folder / "pairs.jsonl").read_text().splitlines()) == 2
        assert stage_counts(store, cycle.id, "pairs")["dropped_less_sure"] == 2
    finally:
        sys.modules.pop("surest", None)
