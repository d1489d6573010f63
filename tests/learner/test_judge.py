"""The gate's judge: facts first, both orders, ties where it is not sure; and never the critic that was learned from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner.critique import Context, Verdict
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, insert_results, results_of
from nightschool_learner.evidence import Measured, evidence_of
from nightschool_learner.gate import Decision, decide
from nightschool_learner.held_out import plan_of
from nightschool_learner.judge import Judging, by_facts, judge_fault, open_judge, shares_of, verdicts_of
from nightschool_learner.prompts import CandidateView
from nightschool_learner.stages import Cycle
from nightschool_server.app import AppError, EvaluationSet, EvaluationTask
from nightschool_server.evaluation_set import read_evaluation
from nightschool_server.store.store import Store

from tests.learner.endpoints import endpoint, prefers_longer
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home

BASIS = Basis("set", "protocol")
CANDIDATE = "0001-aaaaaaaa"
SETTINGS = ("gate.min_n=20", "evaluate.num_seeds=4")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path / "home")
    yield opened
    opened.close()


def held_out(n: int) -> EvaluationSet:
    return EvaluationSet(tuple(EvaluationTask(f"t{i:03}", f"f{i % 2}", f"Say {i}.") for i in range(n)), "set")


def answered(cycle: Cycle, adapter: str, answers: Sequence[str]) -> None:
    """Write greedy answers, in the order of the tasks; an empty one never came."""
    results = [
        TaskResult(f"t{i:03}", f"f{i % 2}", False, text, "answered" if text else "max_steps", 1, 0, 9)
        for i, text in enumerate(answers)
    ]
    insert_results(cycle.store, BASIS, cycle.id, [(adapter, result) for result in results])


def judge_all(cycle: Cycle, critic: FakeCritic, n: int) -> dict[str, float]:
    """Have the judge compare everything; the candidate's share of each task."""
    # Events belong to the loop that first waits for them.
    fresh = replace(cycle, cancelled=asyncio.Event())
    asyncio.run(Judging(fresh, BASIS, CANDIDATE, critic).judge(held_out(n).tasks))
    return shares_of(cycle, list(zip(*(_greedy(cycle, name, n) for name in ("base", CANDIDATE)), strict=True)))


def _greedy(cycle: Cycle, adapter: str, n: int) -> list[TaskResult]:
    known = results_of(cycle.store, BASIS, adapter)
    return [known[f"t{i:03}", GREEDY] for i in range(n)]


class Biased(FakeCritic):
    """Prefers what it is shown first."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        self.calls.append((context, first, second))
        return Verdict("first", 5.0, "A", 20)


class Unsure(FakeCritic):
    """Right, but hardly."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        verdict = await super().compare(context, first, second)
        return replace(verdict, margin_nats=0.5 if verdict.winner == "first" else -0.5)


def test_facts_decide_first_and_the_judge_is_asked_in_both_orders_about_the_rest(store: Store) -> None:
    cycle, critic = cycle_on(store, *SETTINGS), FakeCritic()
    answered(cycle, "base", ["short", "", "same words", "", "a long answer"])
    answered(cycle, CANDIDATE, ["a longer answer", "one", "same  words", "", "brief"])
    shares = judge_all(cycle, critic, 5)
    assert shares == {"t000": 1.0, "t001": 1.0, "t002": 0.5, "t003": 0.5, "t004": 0.0}
    asked = [(context.task, first.action, second.action) for context, first, second in critic.calls]
    assert sorted(asked) == [
        ("Say 0.", "a longer answer", "short"),
        ("Say 0.", "short", "a longer answer"),
        ("Say 4.", "a long answer", "brief"),
        ("Say 4.", "brief", "a long answer"),
    ]


@pytest.mark.parametrize("critic", [Biased(), Unsure()])
def test_a_judge_that_prefers_a_position_or_is_unsure_ties_everything(store: Store, critic: FakeCritic) -> None:
    cycle = cycle_on(store, *SETTINGS)
    answered(cycle, "base", ["short"] * 4)
    answered(cycle, CANDIDATE, ["a longer answer"] * 4)
    assert set(judge_all(cycle, critic, 4).values()) == {0.5}


def test_a_resumed_cycle_pays_for_no_comparison_twice(store: Store) -> None:
    cycle, critic = cycle_on(store, *SETTINGS), FakeCritic()
    answered(cycle, "base", ["short"] * 3)
    answered(cycle, CANDIDATE, ["a longer answer"] * 3)
    first = judge_all(cycle, critic, 2)
    assert len(critic.calls) == 4
    again = judge_all(cycle, critic, 3)
    assert len(critic.calls) == 6
    assert first.items() <= again.items()
    assert {key: verdict.winner for key, verdict in verdicts_of(store, cycle.id).items()} == {
        (f"t{i:03}", order): "first" if order else "second" for i in range(3) for order in (True, False)
    }


def test_where_nobody_was_asked_nothing_is_kept_and_the_task_is_tied(store: Store) -> None:
    class Away(FakeCritic):
        async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
            return Verdict("invalid", 0.0, "", 0, why="unavailable")

    cycle = cycle_on(store, *SETTINGS)
    answered(cycle, "base", ["short"])
    answered(cycle, CANDIDATE, ["a longer answer"])
    assert judge_all(cycle, Away(), 1) == {"t000": 0.5}
    assert verdicts_of(store, cycle.id) == {}
    assert judge_all(cycle, FakeCritic(), 1) == {"t000": 1.0}


def decided(store: Store, better: Callable[[int], bool], critic: FakeCritic | None = None, n: int = 40) -> Decision:
    """The gate on n tasks of which the candidate answers those at length; the incumbent is longer on the others."""
    cycle = cycle_on(store, *SETTINGS, "gate.judge.kind=served", "gate.judge.adapter=active")
    answered(cycle, "base", ["short" if better(i) else "a very long answer" for i in range(n)])
    answered(cycle, CANDIDATE, ["a longer answer" if better(i) else "brief" for i in range(n)])
    judge_all(cycle, critic or FakeCritic(), n)
    plan = plan_of(cycle, held_out(n))
    measured = Measured(*(results_of(store, BASIS, name) for name in ("base", CANDIDATE)))
    evidence = evidence_of(cycle, BASIS, plan, measured)
    assert evidence is not None
    return decide(evidence, cycle.config.gate)


def test_a_candidate_whose_answers_the_judge_prefers_passes_by_its_win_rate(store: Store) -> None:
    decision = decided(store, lambda i: i % 10 != 0)
    assert decision.passed
    judge = decision.evidence.judge
    assert judge is not None
    assert (judge.num_won, judge.num_lost, judge.num_tied, judge.num_asked) == (36, 4, 0, 40)
    assert judge.win_rate == pytest.approx(0.9)
    assert judge.interval.low < 0.9 < judge.interval.high
    assert judge.interval.low > 0.75
    assert judge.first_rate == 0.5
    assert decision.numbers.difference == pytest.approx(0.8)
    assert (decision.numbers.num_gained, decision.numbers.num_lost) == (36, 4)
    assert any("judge: served/base, the training critic, prefers" in str(rule) for rule in decision.rules)
    assert decision.evidence.sampled is None


def test_a_candidate_that_the_judge_does_not_prefer_fails_the_same_rules(store: Store) -> None:
    failed = {rule.name for rule in decided(store, lambda i: i % 2 == 0).rules if not rule.held and rule.decides}
    assert {"difference", "significance", "interval", "judge"} <= failed


def test_a_judge_that_is_never_sure_passes_nobody(store: Store) -> None:
    decision = decided(store, lambda i: True, Biased())
    assert not decision.passed
    assert decision.evidence.judge is not None
    assert (decision.evidence.judge.win_rate, decision.evidence.judge.num_tied) == (0.5, 40)
    assert decision.evidence.judge.first_rate == 1.0


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ((), True),
        (("gate.judge.adapter=active",), True),
        (("gate.allow_training_critic=true",), False),
        (("gate.judge.adapter=0003-cccccccc",), False),
        (
            ("gate.judge.kind=endpoint", "gate.judge.endpoint.base_url=http://j/v1", "gate.judge.endpoint.model=m"),
            False,
        ),
        (('critic.kinds=["facts", "scorer"]',), False),
    ],
)
def test_the_training_critic_may_not_judge_unless_that_is_on_the_record(
    store: Store, overrides: tuple[str, ...], refused: bool
) -> None:
    """The incumbent is the base model, so that `active` is it, too."""
    fault = judge_fault(cycle_on(store, *overrides))
    assert bool(fault) is refused
    if refused:
        assert "the judge served/base is the training critic" in fault
        assert "learner.gate.allow_training_critic = true" in fault


def test_one_endpoint_as_critic_and_judge_is_the_training_critic(store: Store) -> None:
    both = [
        f"{role}.{setting}"
        for role in ("critic", "gate.judge")
        for setting in ("kind=endpoint", "endpoint.base_url=http://j/v1", "endpoint.model=m")
    ]
    assert "the judge m@http://j/v1 is the training critic" in judge_fault(cycle_on(store, *both))


def test_an_endpoint_judges_over_http(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(prefers_longer) as local:
        cycle = cycle_on(
            store, *SETTINGS, "gate.judge.kind=endpoint", f"gate.judge.endpoint.base_url={local.url}",
            "gate.judge.endpoint.model=judge", "gate.judge.rubric=step-1",
        )  # fmt: skip
        answered(cycle, "base", ["short", "a very long answer"])
        answered(cycle, CANDIDATE, ["a longer answer", "brief"])

        async def run() -> None:
            sampler = FakeSampler(lambda prompt, sampling, index: "the served model is not asked")
            async with open_judge(cycle, sampler) as critic:
                await Judging(cycle, BASIS, CANDIDATE, critic).judge(held_out(2).tasks)

        asyncio.run(run())
        assert len(local.seen) == 4
    pairs = list(zip(*(_greedy(cycle, name, 2) for name in ("base", CANDIDATE)), strict=True))
    assert shares_of(cycle, pairs) == {"t000": 1.0, "t001": 0.0}
    role = store.one("SELECT DISTINCT role FROM endpoint_calls")
    assert role == {"role": "judge"}


def test_by_facts_an_answer_beats_none() -> None:
    some = TaskResult("t", "f", False, "yes", "answered", 1, 0, 1)
    none = replace(some, answer="", outcome="max_steps")
    assert [by_facts(some, none), by_facts(none, some), by_facts(none, none)] == [1.0, 0.0, 0.5]
    assert by_facts(some, replace(some, answer="no")) is None


def test_a_set_has_answers_for_all_of_its_tasks_or_for_none(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    lines = ['{"id": "a", "family": "f", "prompt": "Hi"}', '{"id": "b", "family": "f", "prompt": "Ho"}']
    path.write_text("\n".join(lines))
    assert read_evaluation(path).is_judged
    path.write_text("\n".join([lines[0], lines[1][:-1] + ', "answer": "x"}']))
    with pytest.raises(AppError, match="'a' has no 'answer', others have"):
        read_evaluation(path)
    path.write_text(lines[0][:-1] + ', "match": "number"}')
    with pytest.raises(AppError, match="there is no 'answer'"):
        read_evaluation(path)
    path.write_text(lines[0][:-1] + ', "answer": " "}')
    with pytest.raises(AppError, match="'answer' is empty"):
        read_evaluation(path)
