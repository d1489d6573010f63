"""The benchmark of learning: what it counts, its file of rows, and that what a guard is for happens without it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from nightschool_learner import practice_records, records, seed_records
from nightschool_learner.checklist import check_messages, read_answers, read_questions, write_messages
from nightschool_learner.critique import Context, Verdict
from nightschool_learner.evaluation_results import Basis, TaskResult, insert_results
from nightschool_learner.explore import ExploreStage
from nightschool_learner.openai_messages import to_openai
from nightschool_learner.pairs import pairs_of
from nightschool_learner.prompts import CandidateView
from nightschool_learner.registry import stages_of
from nightschool_learner.rubrics import RUBRICS
from nightschool_learner.seed_records import KEPT
from nightschool_learner.stages import Cycle
from nightschool_learner.verdicts import read_json
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import Message, Text, ToolCall, ToolResult, tool_result
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from bench.nights.home import requests_of
from bench.nights.measures import holm, night_of
from bench.nights.rows import ROWS, chosen
from bench.nights.ruled import QUESTIONS, ruled_endpoint
from bench.nights.show import tables
from bench.nights.table import MixedTableError, Table
from bench.nights.truth import Action, accuracy, is_right, pair_verdicts, pictures_of, task_of
from bench.nights.unguarded import Failing, OneOrder, open_first_by_default, open_shared_tools
from examples.shop.app import app as shop
from examples.shop.catalogue import price_of
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home

ROOT = Path(__file__).resolve().parents[2]
BASIS = Basis("set", "protocol")
MINUS, PLUS = (write_call("calculator", {"expression": f"90 {sign} 20"}) for sign in "-+")
CHANGE = "Anna hands over 90 and owes 20. Work out the change."


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path / "home")


@dataclass
class FirstCritic:
    """Prefers whatever it is shown first."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        return Verdict("first", 3.0, "A", 20)


def with_task(store: Store, prompt: str) -> Cycle:
    """A cycle of the shop that is to practise one task, and whose critic nobody audits."""
    cycle = cycle_on(store, "explore.num_candidates=3", "critic.min_agreement=0")
    cycle = replace(cycle, app=shop, app_ref="examples.shop.app:app")
    with store.transaction() as db:
        seed_records.insert_task(db, cycle.id, seed_records.new_task(0, prompt, (), KEPT), [], [])
    return cycle


def change_or_sum(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """The cold sample adds, one hot sample subtracts; then the result is the answer."""
    seen = [part.content for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]
    if seen:
        return seen[-1]
    return PLUS if sampling.n == 1 else (MINUS, PLUS)[index]


async def made_pairs(stage: ExploreStage, cycle: Cycle) -> list[tuple[str, str]]:
    """The chosen and the rejected texts of all pairs that a cycle's steps support."""
    await stage.run(cycle)
    steps = practice_records.decided_steps(cycle.store, cycle.id)
    texts = {candidate.id: candidate.text for step in steps for candidate in step.candidates}
    return [(texts[pair.chosen], texts[pair.rejected]) for step in steps for pair in pairs_of(step)]


async def test_a_critic_that_prefers_a_place_makes_pairs_only_where_it_is_asked_in_one_order(tmp_path: Path) -> None:
    found = []
    for number, critic in enumerate((FirstCritic(), OneOrder(FirstCritic()))):
        cycle = with_task(open_home(tmp_path / str(number)), CHANGE)
        stage = ExploreStage(lambda _: FakeSampler(change_or_sum), lambda *_, c=critic: nullcontext(c))  # type: ignore[misc]
        found.append(await made_pairs(stage, cycle))
    assert found == [[], [(PLUS, MINUS)]]


async def test_a_critic_that_fails_teaches_the_first_candidate_only_where_it_may_not_abstain(tmp_path: Path) -> None:
    found = []
    for number, settings in enumerate(({}, {"open_panel": open_first_by_default})):
        cycle = with_task(open_home(tmp_path / str(number)), CHANGE)
        stage = ExploreStage(
            lambda _: FakeSampler(change_or_sum),
            lambda *_: nullcontext(Failing(FakeCritic(), share=1.0)),
            **settings,  # type: ignore[arg-type]
        )
        found.append(await made_pairs(stage, cycle))
    assert found == [[], [(PLUS, MINUS)]]


async def test_what_a_rejected_candidate_did_is_seen_later_only_where_candidates_share_a_state(tmp_path: Path) -> None:
    def reserve(prompt: Prompt, sampling: Sampling, index: int) -> str:
        seen = [part.content for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]
        if len(seen) == 2:
            return seen[-1]
        if seen:
            return write_call("basket_total", {})
        return write_call("reserve", {"item": "red mug", "quantity": 2 if sampling.n == 1 else (2, 3)[index]})

    answers = []
    for number, settings in enumerate(({}, {"open_tools": open_shared_tools})):
        cycle = with_task(open_home(tmp_path / str(number)), "Reserve 2 of the red mug for Anna.")
        stage = ExploreStage(lambda _: FakeSampler(reserve), lambda *_: nullcontext(FakeCritic()), **settings)  # type: ignore[arg-type]
        await stage.run(cycle)
        answers += [row["answer"] for row in cycle.store.query("SELECT answer FROM rollouts")]
    assert answers == [str(2 * price_of("red mug")), str((2 + 3) * price_of("red mug"))]


async def test_pairs_are_held_against_the_rules_of_the_shop(store: Store) -> None:
    cycle = with_task(store, CHANGE)
    stage = ExploreStage(lambda _: FakeSampler(change_or_sum), lambda *_: nullcontext(OneOrder(FirstCritic())))
    await stage.run(cycle)
    [step] = [step for step in practice_records.decided_steps(store, cycle.id) if step.step.position == 0]
    [pair] = pairs_of(step)
    with store.transaction() as db:
        practice_records.insert_pairs(
            db, [("pair_1", cycle.id, pair.step_id, pair.chosen, pair.rejected, pair.kind, pair.margin, 0.0)]
        )
    assert pair_verdicts(store, cycle.id, {}) == {"wrong": 1}
    assert accuracy({"wrong": 1, "right": 3, "unknown": 7}) == 0.75


def test_an_action_is_right_by_the_one_right_way_however_the_sum_is_written() -> None:
    task = task_of("What do 3 of the red mug cost Emma?", [], {})
    assert task is not None
    price = str(price_of("red mug"))
    looked = Action(write_call("price", {"item": "red mug"}), price)
    turned = Action(write_call("calculator", {"expression": f"{price} * 3"}), task.answer)
    assert is_right(task, [], looked)
    assert not is_right(task, [], Action(task.answer, ""))
    assert is_right(task, [looked], turned)
    assert not is_right(task, [looked], Action(price, ""))
    assert is_right(task, [looked, turned], Action(task.answer, ""))
    assert is_right(task, [turned], looked) is None


def test_what_a_picture_shows_is_known_from_the_traffic() -> None:
    asked = requests_of(1, 40)
    pictures = pictures_of(asked)
    for request in asked:
        images = [sha256 for sha256, task in pictures.items() if task.picture == request.task.picture]
        found = task_of(request.prompt, images, pictures)
        assert found is not None
        assert found.answer == request.answer
    assert task_of("Read the tag and work out 2 of them for Anna.", [], pictures) is None


def said_by_ruled(messages: tuple[Message, ...], errors: float = 0.0) -> str:
    """What the critic with the rules answers when it is asked over the wire."""
    with ruled_endpoint({}, errors) as url:
        body = {"model": "ruled", "messages": to_openai(Prompt(messages), lambda sha256: b"")}
        asked = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answered:
            return str(json.load(answered)["choices"][0]["message"]["content"])


def test_the_critic_with_the_rules_reads_comparisons_and_checklists() -> None:
    called = Message("assistant", (Text(write_call("price", {"item": "red mug"})),))
    result = tool_result(ToolCall("call_0", "price", "{}"), str(price_of("red mug")))
    context = Context("What do 3 of the red mug cost Emma?", (), (called, result))
    expression = f"3 * {price_of('red mug')}"
    right = CandidateView(write_call("calculator", {"expression": expression}), str(3 * price_of("red mug")))
    wrong = CandidateView(str(price_of("red mug")), "")
    ask = RUBRICS["step-2"].ask
    letters = ("A", "B")
    scores = [
        read_json(said_by_ruled(ask(context, views), errors), letters)
        for views, errors in (((right, wrong), 0), ((wrong, right), 0), ((right, right), 0), ((right, wrong), 1))
    ]
    better = [score and (score[0] > score[1]) - (score[0] < score[1]) for score in scores]
    assert better == [1, -1, 0, -1]
    questions = read_questions(said_by_ruled(write_messages(context, 6)), 6)
    assert questions == QUESTIONS
    held = [read_answers(said_by_ruled(check_messages(context, view, questions)), 3) for view in (right, wrong)]
    assert held == [1.0, pytest.approx(1 / 3)]


def test_families_are_corrected_for_there_being_several() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})


def answered(family: str, number: int, success: bool, draw: int = 0) -> TaskResult:
    action = f"{family} {draw if success else 0}"
    return TaskResult(f"{family}-{number}", family, success, "1", "answered", 1, 0, 5, draw=draw, actions=(action,))


def test_a_night_says_what_rose_and_what_fell(store: Store) -> None:
    cycle = cycle_on(store)
    with store.transaction() as db:
        db.execute("UPDATE routes SET active = '1-aa'")
    before = [answered("sum", i, i < 4) for i in range(12)] + [answered("price", i, True) for i in range(12)]
    after = [answered("sum", i, True) for i in range(12)] + [answered("price", i, i < 3) for i in range(12)]
    drawn = [answered("sum", i, draw > 1 + i, draw) for i in range(2) for draw in (1, 2)]
    insert_results(store, BASIS, cycle.id, [("base", result) for result in (*before, *drawn)])
    insert_results(store, BASIS, cycle.id, [("1-aa", result) for result in (*after, *drawn)])
    records.set_candidate(store, cycle.id, "1-aa")
    records.finish(store, cycle.id, "promoted", "rose")
    night = night_of(store, cycle.id, {})
    assert night.active_success is not None
    assert (night.active_success.rate, night.active_success.n) == (15 / 24, 24)
    assert night.active_success.low < 15 / 24 < night.active_success.high
    assert night.against_base is not None
    assert (night.against_base.num_gained, night.against_base.num_lost) == (8, 9)
    assert night.against_base.fallen == ("price",)
    assert night.against_base.families["price"].adjusted_p == pytest.approx(2 * 2 / 2**9)
    assert night.against_base.spread is not None
    assert night.against_base.spread.pass_at_n == (0.5, 0.5)
    assert night.against_base.spread.distinct_actions == (1.5, 1.5)
    assert night.candidate_change == night.against_base
    shown = list(tables({"cycles": [asdict(night), asdict(night)], "ablations": {}, "recipes": {}}))
    assert "| price | 12 | 100% | 25% | 25% | 0.0078 |" in shown
    assert night.candidate_missed == tuple(sorted(f"price-{number}" for number in range(3, 12)))


def test_a_row_that_is_in_the_file_is_not_run_again_and_the_last_line_is_the_table(
    store: Store, tmp_path: Path
) -> None:
    cycle = cycle_on(store)
    records.finish(store, cycle.id, "stopped", "nothing to learn")
    night, file = night_of(store, cycle.id, {}), tmp_path / "rows.json"
    [row] = chosen(["one_order"])
    Table(file, quick=False).add(row, [night])
    command = [sys.executable, "bench/learning.py", "--only", "one_order", "--out", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["cycles"] == []
    assert last["recipes"] == {}
    assert last["ablations"]["one_order"]["nights"][0]["outcome"] == "nothing to learn"
    assert "| `one_order` | the critic is asked in one order only | stopped | nobody was trained |" in done.stdout
    assert done.stderr == ""
    with pytest.raises(MixedTableError, match="whole runs"):
        Table(file, quick=True)


def test_every_row_can_be_chosen_and_its_settings_and_stages_exist() -> None:
    assert {row.name for row in chosen(["recipes"])} == {
        f"{recipe}{critic}" for recipe in ("sport", "rest", "checklist") for critic in ("", "_ruled")
    }
    with pytest.raises(ValueError, match="no row or group is called night"):
        chosen(["night"])
    allowed = LearnerConfig.model_validate({"fault_injection": {"allow": True}})
    for row in ROWS:
        assert stages_of(with_overrides(allowed, row.overrides).stages)
