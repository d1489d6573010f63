"""The gold set, labels, the audit's numbers, and the floors that stop a cycle before training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner import label_command, practice_records, records, seed_records
from nightschool_learner.agreement import Agreement, Judged, faults_of, kappa, measure, pearson
from nightschool_learner.audit import audit, check_answers, gold_of
from nightschool_learner.critique import Context, Critic, Verdict
from nightschool_learner.errors import StageFailedError
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.gold import Better, labelled_pairs, read_gold
from nightschool_learner.label_command import ask_all, take_file
from nightschool_learner.labels import insert_label, offers
from nightschool_learner.panel import JudgeComponent, Panel
from nightschool_learner.practice_records import CandidateRow, RolloutRow, StepRow
from nightschool_learner.prompts import CandidateView
from nightschool_learner.report.gather import build
from nightschool_learner.stages import Cycle
from nightschool_server.config.roles import CriticConfig
from nightschool_server.errors import AppError, InvalidRequestError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.learner.practice_app import app
from tests.learner.practice_home import FakeCritic, FakeSampler, open_home
from tests.learner.test_explore import price_then_answer, with_tasks

PANEL = Panel([JudgeComponent(1.0)])


def line(name: str, a: str, b: str, better: str, **more: object) -> str:
    sides = {"a": {"action": a, "observation": ""}, "b": {"action": b, "observation": "seen"}}
    return json.dumps({"id": name, "task": "What?", "better": better, **sides, **more})


def gold_file(folder: Path, *lines: str) -> Path:
    path = folder / "gold.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def longer_is_better(num: int) -> list[str]:
    """Pairs of which the longer side is better, by turns `a` and `b`."""
    sides = [("long answer", "short"), ("short", "long answer")]
    return [line(f"g{i}", *sides[i % 2], "ab"[i % 2]) for i in range(num)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_home(tmp_path / "home")
    yield opened
    opened.close()


def audited(cycle: Cycle, path: Path) -> Cycle:
    return replace(cycle, app=replace(app, gold=path))


# Reading gold


def test_a_gold_set_is_read_with_its_pictures_and_history(tmp_path: Path) -> None:
    (tmp_path / "mug.png").write_bytes(b"png")
    history = [{"role": "assistant", "text": "look"}, {"role": "tool", "text": "3"}]
    [pair] = read_gold(gold_file(tmp_path, line("g", "x", "y", "tie", images=["mug.png"], history=history)))
    assert (pair.id, pair.context.task, pair.better) == ("g", "What?", "tie")
    assert (pair.a, pair.b) == (CandidateView("x", ""), CandidateView("y", "seen"))
    assert [message.role for message in pair.context.history] == ["assistant", "tool"]
    [sha256] = pair.context.images
    assert pair.context.pixels == {sha256: b"png"}


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("{", "line 2"),
        ("[]", "must be a JSON object"),
        (line("g", "x", "y", "c"), "better is 'c'"),
        (line("g", "", "y", "a"), "action is ''"),
        (line("g", "x", "y", "a", images=["none.png"]), "none.png"),
        (line("g", "x", "y", "a", history=[{"role": "system", "text": "x"}]), "role 'system'"),
        (line("g0", "x", "y", "a"), "'g0' is there twice"),
    ],
)
def test_a_broken_line_says_which_and_why(tmp_path: Path, broken: str, rule: str) -> None:
    with pytest.raises(AppError, match=rule):
        read_gold(gold_file(tmp_path, longer_is_better(1)[0], broken))


# The numbers


def judged(better: Better, said: Better | None, *, margin: float = 1.0, chars: int = 0, first: str = "10") -> Judged:
    return Judged(
        "g", better, said, "" if said else "margin", "judge", margin, chars, tuple(f == "1" for f in first), 0
    )


def test_agreement_counts_what_was_decided_and_kappa_takes_chance_out() -> None:
    pairs = [judged("a", "a")] * 40 + [judged("b", "b")] * 40 + [judged("a", "b")] * 10 + [judged("b", "a")] * 10
    found = measure([*pairs, *[judged("a", None)] * 25, judged("tie", "a"), judged("tie", None)])
    assert (found.num_pairs, found.num_decided, found.num_agreed, found.rate) == (127, 100, 80, 0.8)
    assert found.kappa == pytest.approx(0.6)
    assert found.abstention_rate == pytest.approx(25 / 125)
    assert (found.num_ties, found.num_ties_decided, found.abstentions) == (2, 1, {"margin": 25})
    assert found.agreement is not None
    assert (round(found.agreement.low, 3), round(found.agreement.high, 3)) == (0.711, 0.867)
    assert found.against_paper == "not told apart"
    assert measure([judged("a", "a")] * 100).against_paper == "above"
    assert measure([judged("a", "a"), judged("a", "b")] * 50).against_paper == "below"


def test_kappa_of_known_tables() -> None:
    # Cohen's textbook table: 20, 5 / 10, 15 of 50: p_o 0.7, p_e 0.5.
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert kappa(table) == pytest.approx(0.4)
    assert kappa([]) is None
    assert kappa([("a", "a")] * 5) is None, "chance alone agrees always"


def test_position_length_and_unreadable_answers_are_measured() -> None:
    found = measure([judged("a", None, first="11")] * 20)
    assert found.first_win_rate is not None
    assert found.first_win_rate.low > 0.9
    longer = [
        judged("ab"[i % 2], "ab"[i % 2], margin=m, chars=int(m * 10)) for i, m in enumerate((1.0, -1.0, 2.0, -2.0))
    ]  # type: ignore[arg-type]
    assert measure(longer).length_correlation == pytest.approx(1.0)
    assert measure(longer).gold_length_correlation == pytest.approx(pearson([1, -1, 1, -1], [10, -10, 20, -20]))
    unreadable = replace(judged("a", None, first="1"), num_unreadable=1, margin_of_a=None)
    assert measure([unreadable]).parse_failure_rate == 0.5
    assert pearson([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ([judged("a", "a")] * 10 + [judged("a", "b")] * 20, "min_agreement"),
        ([judged("a", None)] * 30, "decided none"),
        ([judged("a", "a", first="11")] * 30, "max_position_bias"),
        ([judged("a", "a", first="00")] * 30, "max_position_bias"),
        ([replace(judged("a", "a", first=""), num_unreadable=2)] * 30, "max_parse_failures"),
    ],
)
def test_each_floor_is_failed_by_a_critic_like_this(pairs: list[Judged], fault: str) -> None:
    assert any(fault in said for said in faults_of(measure(pairs), CriticConfig()))
    assert faults_of(measure(pairs[:29]), CriticConfig()) == [], "too little gold to tell"


def test_a_good_critic_fails_no_floor() -> None:
    assert faults_of(measure([judged("a", "a"), judged("b", "b")] * 20), CriticConfig()) == []


async def test_the_critic_decides_gold_as_it_decides_steps(store: Store, tmp_path: Path) -> None:
    cycle = with_tasks(store)
    gold = read_gold(gold_file(tmp_path, *longer_is_better(8), line("even", "same", "same", "a")))
    found = await audit(cycle, FakeCritic(), PANEL, gold)
    assert (found.agreement.num_decided, found.agreement.rate) == (8, 1.0)
    assert found.agreement.abstentions == {"margin": 1}
    assert found.agreement.first_win_rate is not None
    assert found.agreement.length_correlation == pytest.approx(1.0)
    assert found.num_tokens == 2 * 9 * 20


# A cycle


def stage(critic: Critic) -> ExploreStage:
    return ExploreStage(lambda cycle: FakeSampler(price_then_answer), lambda cycle, _: nullcontext(critic))


class Contrary(FakeCritic):
    """Prefers the shorter action."""

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        return await super().compare(context, second, first)


async def test_a_cycle_whose_critic_fails_its_floor_stops_before_it_explores(store: Store, tmp_path: Path) -> None:
    cycle = audited(with_tasks(store, "What is a mug?"), gold_file(tmp_path, *longer_is_better(30)))
    ending = await stage(Contrary()).run(cycle)
    assert ending is not None
    assert ending.state == "stopped"
    assert "0.0% of the 30" in ending.outcome
    assert "critic.min_agreement is 70%" in ending.outcome
    assert store.query("SELECT * FROM steps") == []
    kept = build(store, cycle.id).critic_audit
    assert kept is not None
    assert kept["agreement"]["rate"] == 0.0
    assert len(kept["faults"]) == 1


async def test_a_trusted_critic_is_audited_once_and_the_cycle_goes_on(store: Store, tmp_path: Path) -> None:
    cycle = audited(with_tasks(store, "What is a mug?"), gold_file(tmp_path, *longer_is_better(30)))
    critic = FakeCritic()
    assert await stage(critic).run(cycle) is None
    num_asked = len(critic.calls)
    assert store.query("SELECT COUNT(*) AS n FROM audits") == [{"n": 1}]
    again = FakeCritic()
    assert await stage(again).run(audited(with_tasks(store), tmp_path / "gone.jsonl")) is None
    assert (len(again.calls), num_asked > 60) == (0, True), "a resumed cycle audits nothing again"


@pytest.mark.parametrize("setting", ["critic.min_agreement=0", "critic.min_gold=31"])
async def test_without_a_floor_or_enough_gold_nothing_is_asked(store: Store, tmp_path: Path, setting: str) -> None:
    cycle = with_tasks(store, "What is a mug?", overrides=(setting,))
    assert await stage(Contrary()).run(audited(cycle, gold_file(tmp_path, *longer_is_better(30)))) is None
    assert store.query("SELECT * FROM audits") == []


async def test_a_broken_gold_set_ends_the_cycle_with_its_line(store: Store, tmp_path: Path) -> None:
    cycle = audited(with_tasks(store, "What is a mug?"), gold_file(tmp_path, "{"))
    with pytest.raises(StageFailedError, match="line 1"):
        await stage(FakeCritic()).run(cycle)


@pytest.mark.parametrize(("margin", "fault"), [(5.0, "max_position_bias"), (None, "max_parse_failures")])
async def test_a_critic_that_nobody_can_use_stops_the_cycle_without_gold(
    store: Store, margin: float | None, fault: str
) -> None:
    class Useless(FakeCritic):
        async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
            if margin is None:
                return Verdict("invalid", 0.0, "?", 1)
            return Verdict("first", margin, "A", 1)

    cycle = with_tasks(store, *(f"What is mug {i}?" for i in range(12)), overrides=("critic.min_gold=20",))
    await stage(Useless()).run(cycle)
    ending = await CritiqueStage().run(cycle)
    assert ending is not None
    assert (ending.state, fault in ending.outcome) == ("stopped", True)
    records.end_stage(store, cycle.id, "critique")


async def test_a_usable_critic_passes(store: Store) -> None:
    cycle = with_tasks(store, *(f"What is mug {i}?" for i in range(12)), overrides=("critic.min_gold=20",))
    await stage(FakeCritic()).run(cycle)
    assert check_answers(cycle) is None


# Labels


async def explored(store: Store) -> Cycle:
    cycle = with_tasks(store, "What is a mug?", "And the mug?")
    await stage(FakeCritic()).run(cycle)
    return cycle


async def test_pairs_are_offered_blind_and_what_failed_is_not(store: Store) -> None:
    await explored(store)
    offered = offers(store, "ann")
    assert offered == offers(store, "bob")
    assert offered
    assert all("error" not in offer.a.observation + offer.b.observation for offer in offered), "facts decide those"
    assert "margin" not in json.dumps(offered[0].to_json())


def test_both_sides_are_equally_often_first(store: Store) -> None:
    """Which is first follows from the step's id, which is otherwise drawn by chance."""
    cycle = with_tasks(store, *(f"What is mug {i}?" for i in range(200)))
    for task in seed_records.tasks_of(store, cycle.id):
        rollout, step = f"roll_{task.slot}", f"step_{task.slot}"
        said = [CandidateRow(f"{step}-{at}", step, at, text, (), -1.0, 1, "", "", True) for at, text in enumerate("xy")]
        with store.transaction() as db:
            practice_records.start_rollout(db, cycle.id, RolloutRow(rollout, task.id, "running"), "base")
            practice_records.insert_step(db, StepRow(step, rollout, 0, "[]", None, ""), said)
    offered = offers(store, "ann")
    assert len(offered) == 200
    assert 0.45 < sum(offer.b.action == "x" for offer in offered) / 200 < 0.55


async def test_labels_come_back_as_gold_with_the_sides_as_they_are(store: Store) -> None:
    cycle = await explored(store)
    for offer in offers(store, "ann"):
        insert_label(store, offer.id, "a" if len(offer.a.action) > len(offer.b.action) else "b", "ann")
    assert offers(store, "ann") == []
    assert offers(store, "bob") != []
    gold = gold_of(cycle)
    assert len(gold) == store.query("SELECT COUNT(*) AS n FROM labels")[0]["n"] > 4
    found = await audit(cycle, FakeCritic(), PANEL, gold)
    assert found.agreement.rate == 1.0, "they and the fake critic both prefer the longer action"


async def test_the_later_label_counts(store: Store) -> None:
    await explored(store)
    [first, *_] = offers(store, "ann")
    insert_label(store, first.id, "a", "ann")
    insert_label(store, first.id, "tie", "bob")
    assert [pair.better for pair in labelled_pairs(store)] == ["tie"]


async def test_a_person_is_asked_at_the_terminal(store: Store) -> None:
    await explored(store)
    offered = offers(store, "ann")
    said = iter(["a", "what?", "=", "s", "b", "q"])
    out = io.StringIO()
    assert ask_all(store, offered, "ann", lambda prompt: next(said), out) == 3
    assert [row["better"] for row in store.query("SELECT better FROM labels ORDER BY created_at")].count("tie") == 1
    assert "task: " in out.getvalue()
    assert len(offers(store, "ann")) == len(offered) - 3


async def test_labels_come_from_a_file_that_was_exported_and_filled_in(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await explored(store)
    path, home = tmp_path / "blind.jsonl", str(store.home.path)
    assert label_command.main(["--home", home, "--export", str(path), "--num", "3"]) == 0
    rows = [json.loads(each) for each in path.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "task", "images", "history", "a", "b", "better"}] * 3
    filled = [json.dumps({**row, "better": better}) for row, better in zip(rows, ("a", "tie", ""), strict=True)]
    path.write_text("\n".join(filled))
    assert label_command.main(["--home", home, "--file", str(path), "--by", "ann"]) == 0
    assert "2 labels kept" in capsys.readouterr().out
    assert store.query("SELECT COUNT(*) AS n FROM labels WHERE labelled_by = 'ann'") == [{"n": 2}]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"id": "step_x:0:1", "better": "a"}', "no pair of this home"),
        ('{"id": "nonsense", "better": "a"}', "no pair of this home"),
        ('{"id": "step_x:0:1", "better": "c"}', "must be a, b or tie"),
        ('{"better": "a"}', "needs id and better"),
    ],
)
def test_a_file_that_is_not_one_of_labels_is_refused(store: Store, tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=rule):
        take_file(store, path, "ann")
    assert label_command.main(["--home", str(store.home.path), "--file", str(path)]) == 2


def test_without_a_terminal_somebody_must_name_a_file(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert label_command.main(["--home", str(store.home.path)]) == 2
    assert "--export" in capsys.readouterr().err
    assert label_command.main(["--home", str(Home(store.home.path / "none").path)]) == 2


def test_a_report_of_numbers_is_json(store: Store) -> None:
    found = measure([judged("a", "a")])
    assert isinstance(found, Agreement)
    assert found.kappa is None
