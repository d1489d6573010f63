"""A cycle's report: what its page and its JSON say, and that no text of anybody becomes markup or asks the network."""

from __future__ import annotations

import base64
import io
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nightschool_learner import records
from nightschool_learner.curriculum import write_families
from nightschool_learner.evaluation_records import EvaluationRow, insert_evaluation
from nightschool_learner.evaluation_results import Basis, TaskResult, insert_results
from nightschool_learner.explore import ExploreStage
from nightschool_learner.gate import Rule
from nightschool_learner.pairs import PairsStage
from nightschool_learner.report.charts import MAX_POINTS, line_chart, training_charts
from nightschool_learner.report.contents import Report
from nightschool_learner.report.files import as_json, missing, write
from nightschool_learner.report.gather import build
from nightschool_learner.report.page import render
from nightschool_learner.report.pictures import MAX_PICTURE_BYTES, Album
from nightschool_learner.report.summary import summary_of
from nightschool_learner.seed_records import KEPT, Attempt, Seed, insert_seeds, insert_task, new_task
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.records import FileOrigin, Verification, insert_origins, insert_verifications
from nightschool_learner.turns import MAX_CHARS, Said, shown
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.evaluation_set import EvaluationSet, EvaluationTask
from nightschool_server.store.store import Store
from PIL import Image

from tests.learner.practice_app import app
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, log_request, open_home

EVIL = (
    "</div></style><script>alert(1)</script><img src=http://x.example/a onerror=alert(2)>\" ' {{ 7*7 }} {% raw %} ]]>"
)
"""Stands in every text that comes from a user, a model or a tool."""
MUG = write_call("price", {"item": "mug"})
BASIS = Basis("set", "protocol")
VOID = {"meta", "img", "br", "line", "circle", "polyline"}
TAGS = VOID | {
    "html", "head", "title", "style", "body", "main", "header", "section", "footer", "nav", "a", "span", "div", "p",
    "b", "h1", "h2", "h3", "h4", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "i", "code", "details",
    "summary", "figure", "figcaption", "svg", "text", "dl", "dt", "dd",
}  # fmt: skip
"""All that the template itself writes."""


class Page(HTMLParser):
    """What a browser would make of the page: its tags with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def png(side: int = 8, noise: bool = False) -> bytes:
    image = Image.effect_noise((side, side), 90) if noise else Image.new("RGB", (side, side), "red")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
    if prompt.messages[-1].role == "tool":
        return "12" if sampling.n == 1 else [f"12 {EVIL}", "?", "12", "12"][index]
    return MUG if sampling.n == 1 else [write_call("price", {"item": EVIL}), "12", MUG, MUG][index]


async def practised(store: Store) -> Cycle:
    """A cycle up to its pairs, in which every text that somebody else wrote is hostile."""
    cycle = cycle_on(store, "pairs.min_pairs=1")
    picture = store.put_blob(png(), "image/png")
    response = log_request(store, "seed", f"What does one mug cost? {EVIL}", images=[picture])
    with store.transaction() as db:
        db.execute(
            "INSERT INTO feedback (id, response_id, caller, good, comment, correction, created_at) "
            "VALUES ('fb', ?, 'tester', 0, ?, ?, 1)",
            (response, EVIL, EVIL),
        )
        task = new_task(0, f"What is a mug? {EVIL}", (picture,), KEPT)
        tries = [Attempt(EVIL, "parse", 3, EVIL, {"verifier": 5}), Attempt("task", KEPT, 3)]
        insert_task(db, cycle.id, task, tries, [Seed(response, "", (), "feedback")])
        found = FileOrigin(f"a {EVIL}", "picture", f"of it {EVIL}", "retrieved", picture, 0.43, response)
        made = FileOrigin(f"b {EVIL}", "csv", f"sold {EVIL}", "made", picture, num_attempts=2, code=EVIL)
        insert_origins(db, task.id, [found, made])
        insert_verifications(db, task.id, [Verification(1, "repair", f"vague {EVIL}", f"Sum it {EVIL}")])
    insert_seeds(store, cycle.id, [Seed(response, "", (), "feedback")])
    await ExploreStage(lambda cycle: FakeSampler(answer), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    cycle.progress("explore").flush()
    await PairsStage().run(cycle)
    with store.transaction() as db:
        for name, counts in (
            ("seeds", {"dropped_duplicate": 2, "dropped_<script>": 1}),
            ("synthesize", {"dropped_parse": 1, "tokens": 6}),
            ("train", {"pairs": 4}),
        ):
            row = (json.dumps(counts), EVIL, cycle.id, name)
            db.execute("UPDATE stages SET state = 'done', counts = ?, message = ? WHERE cycle_id = ? AND name = ?", row)
    return cycle


def evaluated(cycle: Cycle, *, passed: bool = True) -> EvaluationRow:
    """The cycle's candidate tested on two tasks, of which one became right and one wrong; written to its rows."""
    for adapter, right in (("base", "lost"), ("0001-c", "won")):
        way = (Said("tool", f"price: 3 {EVIL}", (EVIL,)), Said("assistant", "3"))
        answers = [
            TaskResult(n, EVIL, n == right, f"{adapter} {EVIL}", "answered", 2, 0, 9, turns=way if n == "won" else ())
            for n in ("won", "lost")
        ]
        insert_results(cycle.store, BASIS, cycle.id, [(adapter, one) for one in answers])
    row = EvaluationRow(
        id="eval", cycle_id=cycle.id, candidate="0001-c", incumbent="base", set_digest="set", n=2, num_gained=1,
        incumbent_success=0.5, candidate_success=0.5, interval_low=-0.4, interval_high=0.4, interval_level=0.95,
        num_lost=1, p_value=1.0, passed=passed, reasons=(), set_version=1, protocol="protocol", detectable=0.5,
        families=[
            {"family": EVIL, "n": 2, "incumbent_success": 0.5, "candidate_success": 0.5, "num_gained": 1,
             "num_lost": 1, "p_value": 1.0, "non_inferiority_p": 0.5, "provable": False},
        ],
        rules=(Rule("difference", passed, 0, 0.02, f"too small {EVIL}"), Rule("pass@4", True, 0, 1, "noted", False)),
        sampled=None, ability=None, judge=None, early_stop=None, notes=(EVIL,), thresholds={"gate": {"x": EVIL}},
    )  # fmt: skip
    insert_evaluation(cycle.store, row)
    with cycle.store.transaction() as db:
        db.execute("UPDATE cycles SET candidate = NULL, reason = ? WHERE id = ?", (EVIL, cycle.id))
    return row


def trained(cycle: Cycle) -> None:
    (cycle.folder / "train").mkdir()
    rows = [{"step": n, "loss": 1 / n, "rewards/margins": float("nan"), "logps/chosen": -1.0, "kl": 0} for n in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (cycle.folder / "train" / "metrics.jsonl").write_text(text)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


@pytest.fixture
async def cycle(store: Store) -> Cycle:
    """A whole cycle, rejected."""
    made = await practised(store)
    trained(made)
    evaluated(made, passed=False)
    records.finish(store, made.id, "rejected", f"no better {EVIL}")
    return made


def page_of(cycle: Cycle, held_out: EvaluationSet | None = None) -> tuple[Page, str]:
    html = render(build(cycle.store, cycle.id, held_out), cycle.store, {})
    return Page(html), html


async def test_no_text_of_anybody_becomes_markup(cycle: Cycle) -> None:
    page, html = page_of(cycle)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script" not in html
    assert "{{" in page.text, "what looks like a template stays as it was written"
    assert page.text.count("<script>alert(1)</script>") >= 20, "in every place where somebody else's words stand"
    assert html.startswith("<!DOCTYPE html>\n<html lang=")


async def test_the_page_asks_the_network_for_nothing(cycle: Cycle) -> None:
    page, html = page_of(cycle)
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not {"srcset", "action", "poster", "data", "xlink:href"} & set(attributes)
    style = re.findall(r"<style>(.*?)</style>", html, re.S)[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(found for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


async def test_links_within_the_page_lead_somewhere(cycle: Cycle) -> None:
    page, _ = page_of(cycle)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{one}" for one in ids} == {attributes["href"] for tag, attributes in page.tags if tag == "a"}


async def test_the_funnel_says_what_was_kept_and_why_the_rest_was_not(cycle: Cycle) -> None:
    report = build(cycle.store, cycle.id)
    steps = {
        step.stage: (step.num, step.of, {one.reason: one.num for one in step.left_out}) for step in report.funnel_steps
    }
    assert steps["seeds"] == (1, 4, {"duplicate": 2, "<script>": 1})
    assert steps["synthesize"] == (1, 1, {"parse": 1})
    assert steps["explore"] == (1, 1, {})
    assert steps["critique"] == (2, 2, {})
    assert steps["pairs"] == (4, 4, {})
    assert steps["train"] == (4, 4, {})
    assert "2 the same as another one" in page_of(cycle)[0].text


async def test_every_stage_shows_examples_and_a_pair_leads_back_to_its_request(cycle: Cycle) -> None:
    report = build(cycle.store, cycle.id)
    [seed], [task], [dropped] = report.examples.seeds, report.examples.tasks, report.examples.dropped_tasks
    assert seed.feedback.startswith("thumb down, ")
    assert [turn.who for turn in seed.turns] == ["user"], "what the system was told is left out"
    assert (task.seed_requests, dropped.verdict) == (("resp_seed",), "parse")
    assert [step.picked_by for step in report.examples.steps] == ["critic", "critic"]
    assert all(sum(action.is_picked for action in step.actions) == 1 for step in report.examples.steps)
    assert {pair.kind for pair in report.examples.pairs} == {"both_ran", "ran_vs_failed"}
    assert all(pair.chosen.failure == "" for pair in report.examples.pairs)
    lineage = report.lineage
    assert (lineage.num_pairs, lineage.num_tasks, lineage.num_requests, lineage.num_callers) == (4, 1, 1, 1)
    assert {link.request_ids for link in lineage.links} == {("resp_seed",)}


async def test_a_task_stands_with_how_its_files_came_and_what_the_verifier_said(cycle: Cycle) -> None:
    [task], [dropped] = (examples := build(cycle.store, cycle.id).examples).tasks, examples.dropped_tasks
    assert [(origin.source, origin.similarity, origin.num_attempts) for origin in task.origins] == [
        ("retrieved", 0.43, 0), ("made", 0.0, 2),
    ]  # fmt: skip
    assert task.verification is not None
    assert task.verification.original.startswith("Sum it ")
    assert dropped.reason.startswith("</div>")
    text = page_of(cycle)[0].text
    for words in ("made by a program (2 attempts): sold", "found among what users sent (resp_seed, similarity 0.43)"):
        assert words in text
    assert "the verifier repaired it: vague" in text


async def test_the_critic_is_counted(cycle: Cycle) -> None:
    critic = build(cycle.store, cycle.id).critic
    valid = cycle.store.query("SELECT verdict FROM critiques")
    assert critic.num_comparisons == len(valid)
    assert critic.first_share == 0.5, "both orders were asked, and the longer action won in each"
    assert (critic.num_longer_won, critic.num_shorter_won) == (2, 0), "a call against an answer says nothing of length"
    assert critic.prompt_tokens == 20 * len(valid)
    assert sum(critic.decided_by.values()) == critic.num_duels == 3


async def test_practice_says_what_it_covered_how_long_it_took_and_what_a_pair_cost(cycle: Cycle) -> None:
    report = build(cycle.store, cycle.id)
    practice, critic = report.practice, report.critic
    assert [(one.position, one.num_steps, one.num_samples) for one in practice.by_position] == [(0, 1, 5), (1, 1, 5)]
    assert sum(one.num_actions for one in practice.by_position) == practice.num_actions
    assert practice.coverage.num_steps_with_choice == 2
    assert practice.coverage.pass_at_n == 1.0
    assert critic.tokens_per_pair == critic.prompt_tokens / 4
    assert critic.seconds_per_pair == critic.seconds / 4
    assert practice.wall_s is not None, "practice was timed"
    assert practice.engine_busy_share is None, "no engine was in sight"
    said = json.loads(as_json(report))["practice"]
    assert said["coverage"]["choice_share"] == 1.0
    assert said["by_position"][0]["unique_rate"] == practice.by_position[0].num_actions / 5
    assert "best known action, by one sample" in page_of(cycle)[0].text


async def test_families_of_tasks_stand_with_how_often_they_are_solved(cycle: Cycle) -> None:
    assert "Families of tasks" not in page_of(cycle)[0].text
    write_families(cycle.store, cycle.id)
    [family] = build(cycle.store, cycle.id).task_families
    assert (family.name, family.num_tasks, family.num_pairs > 0) == ("price/image", 1, True)
    assert f"price/image1{family.solve_rate:.1%}{family.num_pairs}" in page_of(cycle)[0].text.replace(" ", "")


async def test_tasks_that_the_probe_dropped_and_what_it_cost_are_said(cycle: Cycle) -> None:
    counts = json.dumps({"dropped_always_solved": 3, "dropped_near_duplicate": 2, "probe_tokens": 40})
    with cycle.store.transaction() as db:
        db.execute("UPDATE stages SET counts = ? WHERE cycle_id = ? AND name = 'synthesize'", (counts, cycle.id))
    report = build(cycle.store, cycle.id)
    [written] = [step for step in report.funnel_steps if step.stage == "synthesize"]
    assert [(one.reason, one.num) for one in written.left_out] == [("always_solved", 3), ("near_duplicate", 2)]
    assert ("probe", 40) in [(use.role, use.written) for use in report.tokens]
    text = page_of(cycle)[0].text
    for words in (
        "too easy: every attempt solved it alike",
        "nearly the same as another one",
        "quick attempts at tasks",
    ):
        assert words in text


async def test_the_page_says_how_busy_the_engine_was(cycle: Cycle) -> None:
    assert re.search(r"engine busy-of [\d.]+ s of practice", page_of(cycle)[0].text)
    counts = {"wall_ms": 40_000, "asking_ms": 39_600, "watched_ms": 38_000, "busy_ms": 34_200}
    with cycle.store.transaction() as db:
        db.execute("UPDATE stages SET counts = ? WHERE name = 'explore'", (json.dumps(counts),))
    text = page_of(cycle)[0].text
    assert "engine busy90.0%of 40.0 s of practice; an answer was waited for 99.0% of it" in text


async def test_tasks_that_flipped_stand_with_both_answers_those_that_became_wrong_first(cycle: Cycle) -> None:
    tasks = tuple(EvaluationTask(name, "f", f"question {name} {EVIL}", "42") for name in ("lost", "won"))
    report = build(cycle.store, cycle.id, EvaluationSet(tasks, "set"))
    assert [(one.task_id, one.became) for one in report.changed] == [("lost", "wrong"), ("won", "right")]
    first = report.changed[0]
    assert (first.expected, first.question[:13]) == ("42", "question lost")
    assert (first.before.answer[:5], first.after.answer[:7]) == ("base ", "0001-c ")
    assert (first.before.turns, [turn.who for turn in report.changed[1].after.turns]) == ((), ["tool", "assistant"])
    other = build(cycle.store, cycle.id, EvaluationSet(tasks, "another set")).changed
    assert [one.question for one in other] == ["", ""], "a set that was changed since has other questions"


async def test_curves_are_drawn_where_something_was_logged(cycle: Cycle) -> None:
    report = build(cycle.store, cycle.id)
    assert report.training is not None
    assert report.training.curves["loss"] == ((1.0, 1.0), (2.0, 0.5))
    assert "rewards/margins" not in report.training.curves, "what is no number is no point"
    assert [chart.title for chart in training_charts(report.training.curves)] == [
        "Loss", "Likelihood of the answers", "Distance (KL)",
    ]  # fmt: skip
    many = line_chart("x", [[(float(n), float(n)) for n in range(10_000)]])
    assert many.count(",") <= MAX_POINTS + 1
    assert 'points="' not in line_chart("<b>", [[(1.0, 1.0)]])
    assert "<b>" not in line_chart("<b>", [[(1.0, 1.0)]])


async def test_the_summary_says_why(cycle: Cycle) -> None:
    report = build(cycle.store, cycle.id)
    said = summary_of(report)
    assert said.title.startswith("Rejected: base stays.")
    assert said.because[0].startswith('It failed the rule "better by enough": too small')
    assert any("Of 2 test tasks" in line and "+0.0 points" in line for line in said.because)
    assert "0 of 1 rules that decide held." in said.because
    for state, begins in {
        "promoted": "Promoted: none took over", "stopped": "Stopped: base stays.", "cancelled": "Cancelled:",
        "failed": "Failed:", "running": "This cycle is running.",
    }.items():  # fmt: skip
        assert summary_of(with_state(report, state)).title.startswith(begins)


def with_state(report: Report, state: str) -> Report:
    return replace(report, cycle=replace(report.cycle, state=state))


async def test_the_files_hold_the_same_and_are_the_operator_s_alone(cycle: Cycle) -> None:
    assert missing(cycle.store) == [cycle.id]
    write(cycle.store, cycle.id, app)
    assert missing(cycle.store) == []
    page, data = cycle.folder / "report.html", cycle.folder / "report.json"
    assert {path.stat().st_mode & 0o777 for path in (page, data)} == {0o600}
    found = json.loads(data.read_text())
    report = build(cycle.store, cycle.id)
    assert found["evaluation"]["rules"][0]["name"] == "difference"
    assert found["lineage"]["links"][0]["pair_id"] == report.lineage.links[0].pair_id
    assert len(found["changed"]) == 2
    before = page.read_bytes()
    write(cycle.store, cycle.id, app)
    assert page.read_bytes() == before, "nothing in it depends on when it is written"


async def test_a_user_who_is_forgotten_is_in_no_report_that_is_written_anew(cycle: Cycle) -> None:
    assert "What does one mug cost?" in page_of(cycle)[1]
    with cycle.store.transaction() as db:
        db.execute("DELETE FROM tasks")
        db.execute("DELETE FROM requests")
    page, html = page_of(cycle)
    assert "mug" not in html
    assert "0 requests of 0 callers" in page.text


async def test_a_cycle_that_never_began_to_practise_has_a_report(store: Store) -> None:
    cycle = cycle_on(store)
    records.finish(store, cycle.id, "stopped", "0 seed requests, fewer than 12")
    page, _ = page_of(cycle)
    assert "0 seed requests, fewer than 12" in page.text
    assert "The cycle ended before anything was trained." in page.text
    assert "The cycle ended before anything was tested." in page.text


def test_pictures_are_small_few_and_of_kinds_that_hold_no_script(store: Store) -> None:
    def uri(data: bytes, media_type: str = "image/png") -> str:
        return album.uri(store.put_blob(data, media_type))

    album = Album(store, {"h" * 64: png(9)})
    assert uri(png()) == "data:image/png;base64," + base64.b64encode(png()).decode()
    assert album.uri("h" * 64).startswith("data:image/png;base64,"), "a held-out task's picture is in no blob"
    large = png(600, noise=True)
    assert len(large) > MAX_PICTURE_BYTES
    copy = Image.open(io.BytesIO(base64.b64decode(uri(large).partition(",")[2])))
    assert max(copy.size) == 320
    assert uri(b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "image/svg+xml") == ""
    assert uri(b"no picture") == album.uri("0" * 64) == ""
    album = Album(store, {}, max_total_bytes=2500)
    uris = [uri(png(side, noise=True)) for side in range(20, 30)]
    assert 0 < uris.count("") < 10
    assert sum(map(len, uris)) <= 2500


@pytest.mark.parametrize(
    ("text", "is_shown_as"),
    [
        ("a\u202eb", "a\\u202eb"),
        ("a\x00\x1b[2J\u200bb", "a\\u0000\\u001b[2J\\u200bb"),
        ("one\r\n\ttwo", "one\n\ttwo"),
        ("\ud800", "\\ud800"),
        ("é 漢字 👍", "é 漢字 👍"),
    ],
)
def test_characters_that_hide_or_turn_text_are_written_out(text: str, is_shown_as: str) -> None:
    assert shown(text) == is_shown_as


def test_a_long_text_is_cut_and_says_so() -> None:
    cut = shown("x" * (MAX_CHARS + 1500))
    assert cut == "x" * MAX_CHARS + "... (1,500 more characters)"
