"""Files and tools' images on their way through the learner: seeds, written tasks, forks, pairs, training, held-out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nightschool import AsyncClient
from nightschool_learner import seed_records
from nightschool_learner.examiner import Examiner
from nightschool_learner.explore import ExploreStage
from nightschool_learner.pair_export import export_rows
from nightschool_learner.pairs import PairsStage
from nightschool_learner.prompts import WrittenTask, critic_messages
from nightschool_learner.sampling import PracticeSampler
from nightschool_learner.screening import HeldOut
from nightschool_learner.seed_records import KEPT, Seed
from nightschool_learner.seeds import choose_seeds
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.drafts import belongings_of
from nightschool_learner.trainer_data import encode_pair, parse_messages
from nightschool_learner.trainer_model import load_base
from nightschool_server import chat
from nightschool_server.agent.formats import TOOL_CALLS
from nightschool_server.agent.toolbox import open_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import load_app
from nightschool_server.chat import File, ToolResult
from nightschool_server.config.practice import SeedsConfig
from nightschool_server.engine import GenerateRequest, Prompt, Sampling
from nightschool_server.evaluation_set import read_evaluation
from nightschool_server.store import request_rows
from nightschool_server.store.request_rows import LoggedMessage, RequestRecord, insert_request
from nightschool_server.store.store import Store

from tests.harness import server_thread
from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, open_home
from tests.learner.training_data import MODEL
from tests.server.files_app import png
from tests.server.scripted_engine import ScriptedEngine

APP_REF = "tests.server.files_app:app"
APP = load_app(APP_REF)
NUMBERS = b"40\n2\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


def blob(store: Store, name: str = "numbers.txt", data: bytes = NUMBERS) -> File:
    return File(name, "text/plain", len(data), store.put_blob(data, "text/plain"))


def log_task(store: Store, name: str, prompt: str, files: Sequence[File]) -> None:
    """Log a task with files, as the server does."""
    record = RequestRecord(
        id=f"resp_{name}", method="task", caller="tester", adapter="base", policy="train", status="OK",
        created_at=1.0, ended_at=2.0, outcome="answered", messages=(LoggedMessage(chat.user(prompt, (), files)),),
    )  # fmt: skip
    with store.transaction() as db:
        insert_request(db, record)


def with_task(store: Store, *files: File) -> Cycle:
    """A cycle on the application of files, with one kept task."""
    cycle = replace(cycle_on(store, "pairs.min_pairs=1"), app=APP, app_ref=APP_REF, tools=APP.specs)
    with store.transaction() as db:
        task = seed_records.new_task(0, "Add up numbers.txt", (), KEPT, files)
        seed_records.insert_task(db, cycle.id, task, [], [])
    return cycle


def observations(prompt: Prompt) -> list[str]:
    return [part.content for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]


def test_a_seed_has_the_files_of_its_turn_and_other_files_make_another_task(store: Store) -> None:
    one, other = blob(store), blob(store, data=b"1\n")
    log_task(store, "a", "Add up numbers.txt", [one])
    log_task(store, "b", "Add up numbers.txt", [other])
    log_task(store, "c", "Add up numbers.txt", [one])
    requests = seed_records.trainable_requests(store, 10)
    chosen = choose_seeds(requests, HeldOut(()), SeedsConfig())
    assert sorted(seed.files[0].sha256 for seed in chosen.seeds) == sorted([one.sha256, other.sha256])
    assert chosen.dropped == {"duplicate": 1}
    assert {seed.prompt for seed in chosen.seeds} == {"Add up numbers.txt"}, "the line of a file is no part of it"
    cycle = cycle_on(store)
    seed_records.insert_seeds(store, cycle.id, chosen.seeds)
    assert seed_records.seeds_of(store, cycle.id) == list(chosen.seeds)


def test_a_written_task_brings_the_files_that_it_names() -> None:
    a, b, other_a = (File(name, "text/plain", 1, sha) for name, sha in (("a.txt", "1"), ("b.txt", "2"), ("a.txt", "3")))
    seeds = [
        Seed("r0", "Add up a.txt", (), "", (a,)),
        Seed("r1", "Add up", (), "", (b, other_a)),
        Seed("r2", "", (), ""),
    ]
    assert belongings_of(WrittenTask("Multiply a.txt", None), seeds).files == (a,)
    assert belongings_of(WrittenTask("Compare b.txt and a.txt", None), seeds).files == (a, b)
    assert belongings_of(WrittenTask("Multiply", None), seeds).files == ()
    assert belongings_of(WrittenTask("Multiply", None), seeds[:2]).files == (a,), "every example is about files"


async def test_every_candidate_has_the_tasks_files_in_a_fork_of_its_own(store: Store) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        seen = observations(prompt)
        if len(seen) < 2:
            number = 1 if sampling.n == 1 else 10 ** (index + 1)
            return (
                write_call("append", {"name": "numbers.txt", "number": number})
                if not seen
                else write_call("total", {"name": "numbers.txt"})
            )
        return seen[-1] if sampling.n == 1 else f"{seen[-1]} or {index}"

    sampler = FakeSampler(answer)
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(
        with_task(store, blob(store))
    )
    shown = chat.template_messages(sampler.calls[0][0].messages)[-1]["content"]
    assert shown == "[file: numbers.txt, text/plain, 5 bytes]\nAdd up numbers.txt"
    rows = store.query("SELECT c.observation, s.position FROM candidates c JOIN steps s ON s.id = c.step_id")
    assert {row["observation"] for row in rows if row["position"] == 0} == {"3 numbers"}, "one more each, not five"
    assert [row["observation"] for row in rows if row["position"] == 1] == ["10042"], "the pick wrote 10000"
    assert (store.query("SELECT outcome FROM rollouts")[0]["outcome"]) == "answered"
    assert not list(store.home.cycles.glob("*/workspaces/*"))


async def test_a_tasks_files_stay_while_it_does_and_a_task_without_them_fails(store: Store) -> None:
    file = blob(store)
    cycle = with_task(store, file)
    assert store.sweep_blobs(older_than_s=-1) == 0
    store.blob_path(file.sha256).unlink()
    sampler = FakeSampler(lambda *_: "42")
    with pytest.raises(Exception, match="no step had two different actions"):
        await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    assert store.query("SELECT state, outcome FROM rollouts") == [{"state": "failed", "outcome": "invalid_files"}]
    assert sampler.calls == []


def charts(prompt: Prompt, sampling: Sampling, index: int) -> str:
    """Draws a chart, then answers in several ways."""
    if not observations(prompt):
        return write_call("chart", {"kind": "path"})
    return "it is red" if sampling.n == 1 else ["red", "it is red, I think", "blue", "?"][index]


async def test_pairs_behind_a_tools_image_train_with_it(store: Store) -> None:
    cycle = with_task(store)
    sampler = FakeSampler(charts)
    critic = FakeCritic()
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(critic)).run(cycle)
    await PairsStage().run(cycle)
    sha256 = hashlib.sha256(png((9, 9))).hexdigest()
    last = sampler.calls[-1][0]
    assert (last.messages[-1].images, last.images[sha256]) == ((sha256,), png((9, 9)))
    store.sweep_blobs(older_than_s=-1)
    row = json.loads((cycle.folder / "pairs.jsonl").read_text().splitlines()[-1])
    assert row == export_rows(store, cycle.id, APP.specs)[-1]
    assert row["images"] == [sha256]
    assert row["prompt"][-1]["content"] == [{"type": "image"}, {"type": "text", "text": "the chart"}]
    base = load_base(str(MODEL))
    pair = encode_pair(base.renderer, row, store.home.blobs, base.tokenizer.eos_token_id)
    assert sum(pair.is_image) > 0, "the trainer reads the image at its place"
    served = base.renderer.render(Prompt(last.messages, APP.specs, last.images))
    assert pair.prompt_ids == served.token_ids.tolist(), "the tokens that were served"
    context, first, second = critic.calls[-1]
    asked = critic_messages(context.task, context.images, context.history, first, second)[1].text
    assert "[picture 1] tool: [image]\nthe chart" in asked
    chart = store.query("SELECT images FROM candidates WHERE observation <> '' LIMIT 1")
    assert json.loads(chart[0]["images"]) == [sha256], "the critic can be shown what a candidate's tool gave back"


async def test_a_resumed_rollout_finds_the_image_again(store: Store) -> None:
    cycle = with_task(store)
    await ExploreStage(lambda cycle: FakeSampler(charts), lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    with store.transaction() as db:
        db.execute("UPDATE rollouts SET state = 'running', outcome = ''")
    sampler = FakeSampler(lambda *_: "asked again")
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    assert sampler.calls == [], "the drawn chart is the recorded one: every step is replayed"
    assert store.query("SELECT outcome FROM rollouts") == [{"outcome": "answered"}]


def test_forgetting_a_caller_takes_the_images_of_its_tasks(store: Store) -> None:
    file = blob(store)
    log_task(store, "a", "Add up numbers.txt", [file])
    cycle = cycle_on(store)
    seed = Seed("resp_a", "Add up numbers.txt", (), "traffic", (file,))
    image = store.put_blob(png(), "image/png")
    with store.transaction() as db:
        task = seed_records.new_task(0, "Add up numbers.txt again", (), KEPT, (file,))
        seed_records.insert_task(db, cycle.id, task, [], [seed])
        seed_records.link_blobs(db, task.id, [image])
    with store.transaction() as db:
        _, blobs = request_rows.delete_caller(store, db, "tester")
    assert store.delete_unused_blobs(blobs) == 2
    assert not store.has_blob(image)


def test_a_tools_image_is_read_back_from_the_trainers_file() -> None:
    call = chat.ToolCall("", "chart", "{}")
    told = (chat.user("draw", ["1" * 64]), chat.tool_result(call, "the chart", images=["2" * 64, "3" * 64]))
    rows = chat.template_messages(told)
    assert parse_messages(rows, [sha for message in told for sha in message.images]) == told


async def test_a_held_out_task_brings_files(store: Store, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_bytes(NUMBERS)
    line: dict[str, Any] = {"id": "a", "family": "sum", "prompt": "Add up numbers.txt", "answer": "42"}
    (tmp_path / "plain.jsonl").write_text(json.dumps(line))
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**line, "files": ["numbers.txt"]}))
    held_out = read_evaluation(tmp_path / "tasks.jsonl")
    assert held_out.digest != read_evaluation(tmp_path / "plain.jsonl").digest

    def script(request: GenerateRequest) -> str:
        seen = observations(request.prompt)
        return seen[-1] if seen else write_call("total", {"name": "numbers.txt"})

    engine = ScriptedEngine(script)

    async def start() -> ScriptedEngine:
        return engine

    with server_thread(tmp_path / "home", {"agent.app": APP_REF}, start) as server:
        client = AsyncClient(server.address, token=server.admin[0][1].removeprefix("Bearer "))
        cycle = replace(cycle_on(store), app=APP, app_ref=APP_REF, client=client)
        async with open_tools(APP, APP_REF, num_workers=1, purpose="practice") as tools:
            root = tmp_path / "root"
            examiner = Examiner(cycle, PracticeSampler(cycle), tools, root, held_out.digest, TOOL_CALLS)
            result = await examiner.examine(held_out.tasks[0], "base", 0)
        await client.close()
    assert (result.success, result.answer, result.num_tool_errors) == (True, "42", 0)
    assert "[file: numbers.txt, text/plain, 5 bytes]" in engine.requests[0].prompt.messages[1].text
    assert not list(root.glob("workspace-*"))
