"""Synthesis with a file plan and a verifier, whole: real sandbox, real store, each role a real endpoint."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner import records, seed_records
from nightschool_learner.endpoint_records import costs_of
from nightschool_learner.errors import StageFailedError
from nightschool_learner.explore import ExploreStage
from nightschool_learner.sampling import derive_seed
from nightschool_learner.seed_records import KEPT, TaskRow
from nightschool_learner.seeds import SeedsStage
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.plan import parse_plan
from nightschool_learner.synthesis.records import origins_of, verification_of
from nightschool_learner.synthesize import SynthesizeStage
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import File, ToolResult
from nightschool_server.config.code import CodeConfig
from nightschool_server.config.config import Config
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.config.serving import AgentConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ConfigError
from nightschool_server.store.store import Store

from tests.learner.endpoints import Body, LocalEndpoint, endpoint, text_of
from tests.learner.practice_home import DiedError, FakeCritic, FakeSampler, cycle_on, log_request, open_home
from tests.learner.test_practice_files import APP, APP_REF, blob, log_task
from tests.server.files_app import png
from tests.server.sandboxes import needs_sandbox

ROLES = {
    "writer": "synthesize",
    "captioner": "synthesize.files.captioner",
    "file_maker": "synthesize.files.maker",
    "verifier": "synthesize.verifier",
}
UNHURRIED = AgentConfig(code=CodeConfig(timeout_s=300, cpu_s=300))
"""Importing what programs import takes a busy machine a while."""
HELD_OUT = "How many mugs does the whole town own?"


def plan(task: str, *files: tuple[str, str, str, str]) -> str:
    """What a writer answers."""
    keys = ("name", "type", "source", "description")
    return json.dumps({"task": task, "files": [dict(zip(keys, file, strict=True)) for file in files]})


SOLD = ("sold.csv", "csv", "make", "one number on each line: 40 and 2")
SHELF = ("shelf", "picture", "retrieve", "a red square on a shelf")
HORSE = ("horse", "picture", "retrieve", "a horse at sea")
PLANS = {
    "made": plan("Add up the numbers in sold.csv", SOLD),
    "found": plan("What is on the shelf in the picture?", SHELF),
    "no_match": plan("What does the horse do there?", HORSE),
    "unmade": plan("Add up the numbers in broken.csv", ("broken.csv", *SOLD[1:])),
    "plan_form": "Add up sold.csv",
    "unsolvable": plan("Guess the numbers of next year"),
    "repaired": plan("Multiply what is in the file", SOLD),
    "leaked": plan("Ask about mugs in some way"),
    "unverified": plan("Mumble the numbers of this year"),
    "length": plan("Why", SOLD),
}
VERDICTS = {
    "Guess": {"verdict": "drop", "reason": "nobody knows them", "task": ""},
    "Multiply": {"verdict": "repair", "reason": "it names no file", "task": "Multiply the numbers in sold.csv"},
    "Ask": {"verdict": "repair", "reason": "it is vague", "task": HELD_OUT},
}


def answer(role: str, asked: str, plans: Iterator[str]) -> str:
    """What each role says."""
    match role:
        case "writer":
            return next(plans)
        case "captioner":
            return "A red square on a white shelf."
        case "file_maker":
            name = json.loads(re.findall(r"File:\n<data>(.*?)</data>", asked, re.DOTALL)[0])["name"]
            text = "" if name == "broken.csv" else "40\n2"
            return f"```python\nopen({name!r}, 'w').write({text!r})\n```"
    if "Mumble" in asked:
        return "Well, who knows."
    [first] = re.findall(r"Task:\n<data>(\w+)", asked)
    return json.dumps(VERDICTS.get(first, {"verdict": "keep", "reason": "it can be done", "task": ""}))


def home(path: Path) -> Store:
    store = open_home(path)
    picture = store.put_blob(png(), "image/png")
    log_request(store, "shelf", "What is this?", images=(picture,))
    log_task(store, "sum", "Add up numbers.txt", [blob(store)])
    return store


async def seeded(store: Store, *overrides: str) -> Cycle:
    """A cycle on the application of files, with a held-out task, its seeds chosen."""
    held_out = store.home.path / "held_out.jsonl"
    held_out.write_text(json.dumps({"id": "a", "family": "f", "prompt": HELD_OUT, "answer": "42"}))
    settings = ("num_tasks=10", "min_tasks=1", "concurrency=1", "max_attempts=1", "max_tokens=600", "num_examples=2")
    switches = ("files.enabled=true", "verifier.enabled=true", "files.maker.max_attempts=2", "files.max_reuse=1")
    named = [f"synthesize.{setting}" for setting in (*settings, *switches)]
    cycle = cycle_on(store, "seeds.min_seeds=2", *named, *overrides)
    cycle = replace(cycle, app=replace(APP, evaluation=held_out), app_ref=APP_REF, tools=APP.specs, agent=UNHURRIED)
    await SeedsStage().run(cycle)
    return cycle


@contextmanager
def every_role(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalEndpoint, list[str]]]:
    """An endpoint that plays every role, and the settings that say so."""
    monkeypatch.setenv("TEST_KEY", "secret")
    plans = iter(PLANS.values())

    def rule(body: Body) -> str:
        return answer(body["model"], text_of(body["messages"][1]), plans)

    with endpoint(rule) as local:
        named = {"base_url": local.url, "key_env": "TEST_KEY", "prompt_price": "1", "completion_price": "2"}
        overrides = [f"{section}.kind=endpoint" for section in ROLES.values()]
        for role, section in ROLES.items():
            overrides += [f"{section}.endpoint.{key}={value}" for key, value in {**named, "model": role}.items()]
        yield local, overrides


def states(store: Store, cycle: Cycle) -> dict[str, TaskRow]:
    return dict(zip(PLANS, seed_records.tasks_of(store, cycle.id), strict=True))


def test_what_the_documentation_says_is_a_configuration_and_a_plan() -> None:
    text = (Path(__file__).parents[2] / "docs" / "synthesis.md").read_text()
    [settings] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    config = Config.model_validate(tomllib.loads(settings)).learner.synthesize
    assert config.files.enabled
    assert config.verifier.enabled
    [written] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert parse_plan(written, config.files.max_files).files[0].name == "sales.csv"


@needs_sandbox
async def test_a_night_plans_finds_makes_and_verifies_files_and_practises_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = home(tmp_path)
    with every_role(monkeypatch) as (local, overrides):
        cycle = await seeded(store, *overrides)
        await SynthesizeStage().run(cycle)
    tasks = states(store, cycle)
    assert {name: task.state for name, task in tasks.items()} == {
        **{name: name for name in PLANS},
        **dict.fromkeys(("made", "found", "repaired"), KEPT),
        "leaked": "held_out_text",
    }

    [made], [found] = origins_of(store, tasks["made"].id), origins_of(store, tasks["found"].id)
    assert (made.source, made.num_attempts, "open('sold.csv'" in made.code) == ("made", 1, True)
    assert store.get_blob(tasks["made"].files[0].sha256) == b"40\n2"
    assert (found.source, found.response_id, found.similarity > 0.2) == ("retrieved", "resp_shelf", True)
    assert tasks["found"].images == (found.sha256,)

    said = verification_of(store, tasks["repaired"].id)
    assert said is not None
    assert (said.verdict, said.original) == ("repair", "Multiply what is in the file")
    assert tasks["repaired"].prompt == "Multiply the numbers in sold.csv", "the repaired task is what is used"
    shown = [body for body in local.seen if body["model"] == "verifier"]
    assert "File sold.csv, text/csv, 4 bytes:\n<data>40\n2</data>" in text_of(shown[0]["messages"][-1])
    assert shown[1]["messages"][-1]["content"][0]["type"] == "image_url", "it sees pictures as pictures"

    progress = cycle.progress("synthesize")
    progress.flush()
    counts = records.stage_counts(store, cycle.id, "synthesize")
    assert {key: n for key, n in counts.items() if "tokens" not in key} == {
        "kept": 3, "captions": 1, "files_made": 2, "files_retrieved": 1, "verifier_keep": 2, "verifier_repair": 2,
        "verifier_drop": 1, "verifier_unreadable": 1, "dropped_no_match": 1, "dropped_unmade": 1,
        "dropped_plan_form": 1, "dropped_unsolvable": 1, "dropped_held_out_text": 1, "dropped_unverified": 1,
        "dropped_length": 1,
    }  # fmt: skip
    spent = {cost.role: (cost.num_calls, cost.completion_tokens) for cost in costs_of(store, cycle.id)}
    assert {role: calls for role, (calls, _) in spent.items()} == {
        "writer": 10, "captioner": 1, "file_maker": 4, "verifier": 6,
    }  # fmt: skip
    assert {role: counts[f"{role}_tokens"] for role in ROLES if role != "writer"} == {
        role: tokens for role, (_, tokens) in spent.items() if role != "writer"
    }
    assert counts["tokens"] == spent["writer"][1]
    assert not (cycle.folder / "making").exists()

    await practise(cycle)


async def practise(cycle: Cycle) -> None:
    """Each rollout adds up the file that lies in its workspace."""
    brought: list[File] = []

    def act(prompt: Prompt, sampling: Sampling, index: int) -> str:
        seen = [part.content for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]
        if seen:
            return seen[-1] if sampling.n == 1 else f"it is {seen[-1]}, {index}"
        brought.extend(prompt.messages[-1].files)
        return write_call("total", {"name": "sold.csv"})

    sampler = FakeSampler(act)
    assert cycle.store.sweep_blobs(older_than_s=-1) == 0, "what a task brings stays"
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    rows = cycle.store.query(
        "SELECT t.prompt, c.observation FROM candidates c JOIN steps s ON s.id = c.step_id "
        "JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id WHERE s.position = 0 ORDER BY t.slot"
    )
    assert {row["prompt"]: row["observation"] for row in rows if "sold.csv" in row["prompt"]} == {
        "Add up the numbers in sold.csv": "42",
        "Multiply the numbers in sold.csv": "42",
    }
    assert {file.line.strip() for file in brought} == {"[file: sold.csv, text/csv, 4 bytes]"}


def served() -> FakeSampler:
    """The served model in every role, told apart by what it is asked to be."""
    openings = {"Write one new": "writer", "Describe": "captioner", "You make": "file_maker", "You check": "verifier"}
    sampler = FakeSampler(lambda *_: "")

    def say(prompt: Prompt, sampling: Sampling, index: int) -> str:
        opening = prompt.messages[0].text
        role = next(name for start, name in openings.items() if opening.startswith(start))
        if role == "writer":
            slot = [SEEDS_OF_SLOTS[sampling.seed]] if sampling.seed in SEEDS_OF_SLOTS else []
            return slot[0] if slot else ""
        return answer(role, prompt.messages[1].text, iter(()))

    sampler.answer = say
    return sampler


SEEDS_OF_SLOTS: dict[int | None, str] = {}


def outcome(store: Store) -> list[Any]:
    """Everything that the slots left, without ids and times."""
    return [
        store.query("SELECT slot, prompt, state, raw, tokens, role_tokens, images, files FROM tasks ORDER BY slot"),
        store.query(
            "SELECT t.slot, f.name, f.source, f.sha256, f.similarity, f.code FROM task_files f "
            "JOIN tasks t ON t.id = f.task_id ORDER BY t.slot, f.position"
        ),
        store.query(
            "SELECT t.slot, v.attempt, v.verdict, v.original FROM verifications v JOIN tasks t ON t.id = v.task_id "
            "ORDER BY t.slot, v.attempt"
        ),
        store.query("SELECT sha256, model, text FROM descriptions ORDER BY sha256"),
    ]


@needs_sandbox
async def test_a_killed_synthesis_with_files_comes_to_the_same_tasks(tmp_path: Path) -> None:
    written = [PLANS["found"], PLANS["found"].replace("shelf in", "shelf behind"), PLANS["made"], PLANS["repaired"]]
    SEEDS_OF_SLOTS.update({derive_seed(7, "write", slot, 0): text for slot, text in enumerate(written)})
    whole = home(tmp_path / "whole")
    settings = "synthesize.num_tasks=4"
    await SynthesizeStage(lambda cycle: served()).run(await seeded(whole, settings))
    assert [row["state"] for row in whole.query("SELECT state FROM tasks ORDER BY slot")] == [
        KEPT, "no_match", KEPT, KEPT,
    ], "the one picture is in one task, as max_reuse says"  # fmt: skip
    for die_at in (2, 4, 7):
        store = home(tmp_path / str(die_at))
        sampler = served()
        sampler.die_at = die_at
        with pytest.raises(DiedError):
            await SynthesizeStage(lambda cycle: sampler).run(await seeded(store, settings))  # noqa: B023
        await SynthesizeStage(lambda cycle: served()).run(await seeded(store, settings))
        assert outcome(store) == outcome(whole), f"killed at call {die_at}"
        cycle = await seeded(store, settings)
        cycle.progress("synthesize").begin(0)
        await SynthesizeStage(lambda cycle: served()).run(cycle)
        counts = cycle.progress("synthesize").counts
        assert (counts["files_made"], counts["captions"]) == (2, 1), "the rows count what is done"


@needs_sandbox
async def test_an_embedder_that_is_away_costs_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "secret")
    SEEDS_OF_SLOTS.update({derive_seed(7, "write", 0, attempt): PLANS["found"] for attempt in (0, 1)})
    with endpoint(lambda body: "") as local:
        named = {"base_url": local.url, "model": "letters", "key_env": "TEST_KEY", "max_retries": "0"}
        settings = [f"synthesize.files.embedder.endpoint.{key}={value}" for key, value in named.items()]
        cycle = await seeded(
            home(tmp_path), "synthesize.files.embedder.kind=endpoint", *settings, "synthesize.num_tasks=1",
            "synthesize.max_attempts=2", "synthesize.files.min_similarity=0.1",
        )  # fmt: skip
        sampler = served()
        asked = sampler.answer

        def fail_once(prompt: Prompt, sampling: Sampling, index: int) -> str:
            if prompt.messages[0].text.startswith("Write one new") and len(local.seen) == 1:
                local.faults.append("500")
            return asked(prompt, sampling, index)

        sampler.answer = fail_once
        await SynthesizeStage(lambda cycle: sampler).run(cycle)
    [row] = cycle.store.query("SELECT state, raw FROM tasks")
    assert [attempt["verdict"] for attempt in json.loads(row["raw"])] == ["unavailable", KEPT]


def test_a_writer_whose_plan_would_be_cut_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens = 128 cuts off: set it to 200 or more"):
        with_overrides(LearnerConfig(), ["synthesize.files.enabled=true"])


async def test_files_are_not_made_without_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = await seeded(home(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        StageFailedError, match=r"learner\.synthesize\.files .* bwrap is not on the PATH.*install bubble"
    ):
        await SynthesizeStage(lambda cycle: served()).run(cycle)
    assert seed_records.tasks_of(cycle.store, cycle.id) == []


@pytest.mark.parametrize(("on_unreadable", "state"), [("drop", "unverified"), ("keep", KEPT)])
async def test_a_verifier_looks_at_plain_tasks_too_and_an_unreadable_one_is_what_the_setting_says(
    tmp_path: Path, on_unreadable: str, state: str
) -> None:
    store = home(tmp_path)
    cycle = await seeded(
        store, "synthesize.files.enabled=false", "synthesize.num_tasks=1", "synthesize.min_tasks=1",
        f"synthesize.verifier.on_unreadable={on_unreadable}", "synthesize.max_attempts=1",
    )  # fmt: skip

    def say(prompt: Prompt, sampling: Sampling, index: int) -> str:
        is_writer = prompt.messages[0].text.startswith("Write")
        return "picture: none\ntask: Add up numbers.txt twice" if is_writer else "Well, who knows."

    with nullcontext() if state == KEPT else pytest.raises(Exception, match="0 tasks kept of 1"):
        await SynthesizeStage(lambda cycle: FakeSampler(say)).run(cycle)
    [task] = seed_records.tasks_of(store, cycle.id)
    assert task.state == state
    said = verification_of(store, task.id)
    assert said is not None
    assert (said.verdict, said.reason.startswith("the answer is not one JSON object")) == ("unreadable", True)
    assert [file.name for file in task.files] == ["numbers.txt"]
