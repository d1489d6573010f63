"""Who decides a duel: the order of the components, vetoes, abstentions; scorer, feedback and consistency at work."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.critique import Contender, Context, Duel, Verdict
from nightschool_learner.errors import StageFailedError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.feedback import asked_words, open_feedback, shape_of, similarity
from nightschool_learner.panel import Case, JudgeComponent, Panel, ScoreComponent, consistency
from nightschool_learner.panels import open_panel
from nightschool_learner.practice_counts import critique_counts
from nightschool_learner.prompts import CandidateView
from nightschool_learner.scoring import open_scorer
from nightschool_learner.stages import Cycle
from nightschool_server.agent.formats import TOOL_CALLS
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import App, ScoredStep, load_app
from nightschool_server.chat import assistant, user
from nightschool_server.config.roles import CriticConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import AppError
from nightschool_server.store.request_rows import LoggedMessage, RequestRecord, insert_request
from nightschool_server.store.store import Store
from pydantic import ValidationError

from tests.learner import scored_app
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home
from tests.learner.test_explore import with_tasks


def case(*actions: str, samples: tuple[int, ...] = (), judge: Callable[[int, int], float] | None = None) -> Case:
    """Candidates by their actions; `judge` gives the margin of the first shown."""

    async def compare(first: int, second: int) -> Verdict:
        margin = judge(first, second) if judge else 0.0
        return Verdict("first" if margin > 0 else "second", margin, "", 1)

    views = {i: CandidateView(action, "") for i, action in enumerate(actions)}
    counts = samples or (1,) * len(actions)
    contenders = {i: Contender(i, counts[i], 0.0, False) for i in range(len(actions))}
    return Case(Context("What does a mug cost?", (), ()), views, contenders, compare)


def scores(*values: float | None, name: str = "scorer") -> ScoreComponent:
    async def score(case: Case, position: int) -> float | None:
        return values[position]

    return ScoreComponent(name, 0.5, score)


JUDGE = JudgeComponent(1.0)


def prefers(position: int, by: float = 3.0) -> Callable[[int, int], float]:
    return lambda first, second: by if first == position else -by


async def test_the_first_component_that_is_sure_decides_and_is_named() -> None:
    panel = Panel([scores(0.0, 1.0), JUDGE])
    assert await panel.decide(case("x", "y", judge=prefers(0)), 0, 1) == Duel(1, margin=1.0, component="scorer")
    panel = Panel([JUDGE, scores(0.0, 1.0)])
    assert await panel.decide(case("x", "y", judge=prefers(0)), 0, 1) == Duel(0, margin=3.0, component="judge")


@pytest.mark.parametrize("values", [(None, 1.0), (0.0, None), (0.2, 0.4)])
async def test_one_that_cannot_say_passes_the_duel_on(values: tuple[float | None, float | None]) -> None:
    panel = Panel([scores(*values), JUDGE])
    assert (await panel.decide(case("x", "y", judge=prefers(0)), 0, 1)).component == "judge"


async def test_a_judge_that_prefers_a_position_passes_the_duel_on() -> None:
    panel = Panel([JUDGE, scores(0.0, 1.0)])
    assert (await panel.decide(case("x", "y", judge=lambda *_: 3.0), 0, 1)) == Duel(1, margin=1.0, component="scorer")


async def test_where_all_abstain_nobody_wins_for_the_reason_of_the_first_that_gave_one() -> None:
    panel = Panel([scores(None, None), JUDGE, scores(0.1, 0.2)])
    assert await panel.decide(case("x", "y", judge=lambda *_: 3.0), 0, 1) == Duel(None, "disagreement", component="")
    assert (await Panel([scores(None, None)]).decide(case("x", "y"), 0, 1)).why == "silent"


async def test_a_veto_holds_only_where_it_is_sure_of_the_contrary() -> None:
    against, with_it, unsure = scores(0.0, 1.0), scores(1.0, 0.0), scores(0.1, 0.2)
    steps = case("x", "y", judge=prefers(0))
    assert await Panel([JUDGE], [against]).decide(steps, 0, 1) == Duel(None, "veto", 1.0, "scorer")
    for veto in (with_it, unsure, scores(None, None)):
        decided = await Panel([JUDGE], [veto]).decide(case("x", "y", judge=prefers(0)), 0, 1)
        assert decided.winner == 0


async def test_a_candidate_is_scored_once_however_many_rivals_it_meets() -> None:
    asked: list[int] = []

    async def score(case: Case, position: int) -> float | None:
        asked.append(position)
        return float(position)

    panel, steps = Panel([ScoreComponent("scorer", 0.5, score)]), case("x", "y", "z")
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (await panel.decide(steps, a, b)).winner == b
    assert sorted(asked) == [0, 1, 2]


async def test_consistency_goes_by_the_share_of_samples() -> None:
    panel = Panel([ScoreComponent("consistency", 1.0, consistency)])
    duel = await panel.decide(case("x", "y", samples=(4, 1)), 0, 1)
    assert (duel.winner, duel.margin) == (0, pytest.approx(math.log(4.5 / 1.5)))
    assert (await panel.decide(case("x", "y", samples=(3, 2)), 0, 1)).winner is None


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kinds": ("judge",)}, "begin with 'facts'"),
        ({"kinds": ("facts", "judge", "judge")}, "once"),
        ({"vetoes": ("facts",)}, "has lost already"),
    ],
)
def test_a_panel_that_makes_no_sense_is_refused(settings: dict[str, tuple[str, ...]], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        CriticConfig(**settings)  # type: ignore[arg-type]


# The application's scorer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def scored(cycle: Cycle) -> Cycle:
    return replace(cycle, app=scored_app.app, app_ref="tests.learner.scored_app:app")


async def test_the_scorer_runs_in_a_tool_worker_and_is_told_the_whole_step(store: Store) -> None:
    steps = case("12", "a dozen", write_call("price", {"item": "mug"}), "crash", "not a number", "whose process?")
    steps = replace(steps, context=replace(steps.context, history=(assistant("hm"), user("well?"))))
    async with open_scorer(scored(cycle_on(store))) as score:
        assert [await score(steps, position) for position in range(5)] == [1.0, 0.0, None, None, None]
        ours = float(os.getpid())
        assert await score(steps, 5) not in (None, ours)
    assert not list((store.home.cycles).glob("*/scorer-*"))


async def test_an_application_without_a_scorer_that_a_cycle_names_ends_it(store: Store) -> None:
    cycle = cycle_on(store, 'critic.kinds=["facts", "scorer"]')
    with pytest.raises(StageFailedError, match=r"@app\.scorer"):
        async with open_panel(cycle, FakeSampler(lambda *_: "")):
            pass


def test_a_scorer_is_given_as_an_argument_or_by_decoration_and_once() -> None:
    def one(step: ScoredStep) -> float:
        return 1.0

    app = App(name="a", system_prompt="", scorer=one)  # type: ignore[arg-type]
    assert app.scorer.function is one
    with pytest.raises(AppError, match="a scorer already"):
        app.scorer(one)
    assert load_app("tests.learner.scored_app:app").scorer.function is not None
    assert [spec.name for spec in scored_app.app.specs] == ["price"], "the model is not shown the scorer"


async def test_a_step_records_which_component_decided(store: Store) -> None:
    """Two candidates that the judge cannot part and the scorer can."""

    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        return "12" if sampling.n == 1 else ["ab", "12", "12", "12"][index]

    overrides = ('critic.kinds=["facts", "judge", "scorer"]',)
    cycle = scored(with_tasks(store, "What is a mug?", overrides=overrides))
    stage = ExploreStage(lambda cycle: FakeSampler(answer), lambda cycle, _: nullcontext(FakeCritic()))
    await stage.run(cycle)
    assert store.query("SELECT a, b, winner, why, margin, component FROM duels") == [
        {"a": 0, "b": 1, "winner": 0, "why": "", "margin": 1.0, "component": "scorer"}
    ]
    assert critique_counts(store, cycle.id)["decided_by_scorer"] == 1
    assert store.query("SELECT picked, picked_by FROM steps") == [{"picked": 0, "picked_by": "critic"}]


# Feedback on similar requests


def log_with_feedback(store: Store, name: str, prompt: str, action: str, **said: object) -> None:
    record = RequestRecord(
        id=f"resp_{name}", method="task", caller="ann", adapter="base", policy="train", status="OK", created_at=1.0,
        ended_at=2.0, outcome="answered",
        messages=(LoggedMessage(user(prompt)), LoggedMessage(assistant(action), sampled=True)),
    )  # fmt: skip
    values = {"good": None, "score": None, "correction": "", **said}
    with store.transaction() as db:
        insert_request(db, record)
        db.execute(
            "INSERT INTO feedback (id, response_id, caller, good, score, comment, correction, created_at) "
            "VALUES (?, ?, 'ann', ?, ?, '', ?, 1.0)",
            (f"feed_{name}", f"resp_{name}", values["good"], values["score"], values["correction"]),
        )


def sum_of(expression: str) -> str:
    return write_call("calculator", {"expression": expression})


def test_an_action_s_shape_is_what_it_does_whatever_the_values() -> None:
    assert shape_of(sum_of("41 + 7"), TOOL_CALLS) == shape_of(sum_of("8 + 1234"), TOOL_CALLS)
    assert shape_of(sum_of("41 + 7"), TOOL_CALLS) != shape_of(sum_of("41 - 7"), TOOL_CALLS)
    words = asked_words("Anna pays 50 for goods worth 12.")
    assert similarity(words, asked_words("Ben pays 7 for goods worth 3.")) == pytest.approx(4 / 6)
    assert similarity(words, asked_words("Count the shapes.")) == 0


async def scorings(store: Store, *actions: str) -> list[float | None]:
    steps = case(*actions)
    steps = replace(steps, context=replace(steps.context, task="Ben pays 60 for goods worth 22. What is the change?"))
    score: Callable[[Case, int], Awaitable[float | None]] = open_feedback(cycle_on(store))
    return [await score(steps, position) for position in range(len(actions))]


async def test_what_people_thought_of_the_same_action_elsewhere_counts(store: Store) -> None:
    asked = "Anna pays 50 for goods worth 12. What is the change?"
    log_with_feedback(store, "a", asked, sum_of("50 + 12"), good=0)
    log_with_feedback(store, "b", asked, sum_of("50 + 12"), score=0.1)
    log_with_feedback(store, "c", asked, sum_of("50 - 12"), good=1)
    log_with_feedback(store, "d", "What is the price of the lamp?", sum_of("60 / 22"), good=1)
    log_with_feedback(store, "e", asked, "48", correction=sum_of("50 * 12"))
    found = await scorings(store, sum_of("60 + 22"), sum_of("60 - 22"), sum_of("60 / 22"), "38", sum_of("2 * 3"))
    assert found == [-1.0, 1.0, None, None, 1.0]
