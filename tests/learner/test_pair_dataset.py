"""`nightschool pairs export DIR` and `pairs show`: what a server holds, as TRL reads it and as a person does."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner.pair_dataset import has_tool_pictures, main
from nightschool_learner.pair_export import write_rows
from nightschool_learner.trainer_data import parse_messages
from nightschool_server.chat import messages_to_json
from nightschool_server.home import Home
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from tests.harness import SHOP_MODEL, Running, server_thread
from tests.learner.training_data import picture_pair, text_pair
from tests.server.scripted_engine import ScriptedEngine

COMMAND = (sys.executable, "-c", "from nightschool.cli import main; main()")


@dataclass(frozen=True)
class World:
    """A server with a cycle of text pairs and one of both."""

    server: Running
    text_cycle: str
    mixed_cycle: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine()

    async def start() -> ScriptedEngine:
        return engine

    with server_thread(
        tmp_path_factory.mktemp("pairs") / "home", {"agent.app": "examples.shop.app:app"}, start
    ) as server:
        store = Store.open(Home(server.home), migrate=False)
        rng = random.Random(1)
        text = [text_pair(rng, second_step=number % 2 == 1) for number in range(4)]
        blobs = server.home / "blobs"
        mixed = [text_pair(rng), picture_pair(rng, blobs), picture_pair(rng, blobs)]
        found = World(server, practise(store, text), practise(store, mixed))
        keep_feedback(Home(server.home), found)
        yield found
        store.close()


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def keep_feedback(home: Home, world: World) -> None:
    """What both cycles wrote of two answers; the later one has more of the first."""
    asked = {"prompt": [{"role": "user", "content": "What do 3 cost?"}], "tools": None, "images": [], "adapter": "base"}
    one, two = {**asked, "response_id": "resp_1"}, {**asked, "response_id": "resp_2"}
    early, late = (home.cycles / cycle for cycle in (world.text_cycle, world.mixed_cycle))
    for folder in (early, late):
        folder.mkdir(parents=True)
    write_rows(early / "corrections.jsonl", [{**one, "completion": said("35")}])
    write_rows(late / "corrections.jsonl", [{**one, "completion": said("36")}])
    write_rows(early / "thumbs.jsonl", [{**one, "completion": said("30"), "label": False}])
    write_rows(late / "thumbs.jsonl", [{**two, "completion": said("36"), "label": True}])


def insert(store: Store, table: str, **values: Any) -> None:
    with store.transaction() as db:
        marks = ", ".join("?" * len(values))
        db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))


def practise(store: Store, rows: list[dict[str, Any]]) -> str:
    """A cycle whose rows hold these pairs; the last was decided by facts. Returns its id."""
    cycle = new_id("cycle")
    now = time.time()
    insert(store, "cycles", id=cycle, state="promoted", trigger="manual", reason="", candidate="1-abc", created_at=now)
    for slot, row in enumerate(rows):
        keep_pair(store, cycle, slot, row, failed=slot == len(rows) - 1)
    return cycle


def keep_pair(store: Store, cycle: str, slot: int, row: dict[str, Any], *, failed: bool) -> None:
    now = time.time()
    task, rollout, step = new_id("task"), new_id("roll"), new_id("step")
    for sha256 in row["images"]:
        if not store.query("SELECT 1 FROM blobs WHERE sha256 = ?", (sha256,)):
            size = store.blob_path(sha256).stat().st_size
            insert(store, "blobs", sha256=sha256, size_bytes=size, media_type="image/png", created_at=now)
    insert(
        store, "tasks", id=task, cycle_id=cycle, slot=slot, prompt="a task", images=json.dumps(row["images"]),
        state="kept", raw="", created_at=now,
    )  # fmt: skip
    insert(store, "rollouts", id=rollout, cycle_id=cycle, task_id=task, adapter="base", state="done", started_at=now)
    history = messages_to_json(parse_messages(row["prompt"], row["images"]))
    insert(store, "steps", id=step, rollout_id=rollout, position=0, history=history, picked=0, created_at=now)
    for position, side in enumerate(("chosen", "rejected")):
        insert(
            store, "candidates", id=f"{step}-{position}", step_id=step, position=position,
            text=row[side][0]["content"], token_ids=json.dumps(row.get(f"{side}_token_ids") or [7, 8, 9 + position]),
            logprob=-1.5, num_samples=3, observation="12", final=0,
            failure="execution" if failed and position else "",
        )  # fmt: skip
    if not failed:
        insert(store, "duels", step_id=step, a=0, b=1, winner=0, why="", margin=2.0, component="judge")
        for first, second, verdict, margin in ((0, 1, "first", 2.0), (1, 0, "second", -3.0)):
            insert(
                store, "critiques", id=new_id("crit"), step_id=step, first=first, second=second, verdict=verdict,
                margin=margin, raw="A" if first == 0 else "B", prompt_tokens=9, created_at=now,
            )  # fmt: skip
    insert(
        store, "pairs", id=new_id("pair"), cycle_id=cycle, step_id=step, chosen=f"{step}-0", rejected=f"{step}-1",
        kind="ran_vs_failed" if failed else "both_ran", margin=0.0 if failed else 2.0, created_at=now,
    )  # fmt: skip


def export(world: World, folder: Path, cycle: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The data set of a cycle, as `datasets` loads it."""
    from datasets import load_dataset

    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(world.server.home))
    assert main([str(folder), "--cycle", cycle]) == 0
    return load_dataset(str(folder), "preferences", split="train", cache_dir=str(folder.parent / "cache"))


def train_a_step(dataset: Any, folder: Path, processing_class: Any) -> list[float]:
    """Losses of TRL's own DPOTrainer on the data set as it is."""
    from transformers import AutoModelForImageTextToText
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], bf16=False,
        logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(SHOP_MODEL, dtype="float32"),
        args=config,
        train_dataset=dataset,
        processing_class=processing_class,
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_text_pairs_as_they_are(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    dataset = export(world, tmp_path / "data", world.text_cycle, monkeypatch)
    assert "images" not in dataset.column_names
    assert len(dataset) == 4
    row = dataset[1]
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "tool"]
    assert row["chosen"][0]["role"] == "assistant"
    assert "calculator" in [tool["function"]["name"] for tool in row["tools"]]
    assert (row["chosen_token_ids"], row["rejected_token_ids"]) == ([7, 8, 9], [7, 8, 10])
    assert (row["kind"], row["margin"], row["sampled_by"], row["trained"]) == ("both_ran", 2.0, "base", "1-abc")
    (loss,) = train_a_step(dataset, tmp_path / "run", AutoTokenizer.from_pretrained(SHOP_MODEL))
    assert loss == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are the same at the first step


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_pairs_with_pictures_as_they_are(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    dataset = export(world, tmp_path / "data", world.mixed_cycle, monkeypatch)
    assert [len(images) for images in dataset["images"]] == [0, 1, 1]
    assert dataset[1]["images"][0].size == (64, 64)
    (loss,) = train_a_step(dataset.select([1, 2]), tmp_path / "run", AutoProcessor.from_pretrained(SHOP_MODEL))
    assert loss == pytest.approx(0.6931, abs=1e-3)


def test_the_card_counts_and_names_what_the_rows_come_from(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(world, tmp_path / "data", "", monkeypatch)
    card = (tmp_path / "data" / "README.md").read_text()
    rows = tmp_path / "data" / "data" / "preferences.parquet"
    for said in (
        "| preferences | 7 |", "| corrections | 1 |", "| thumbs | 2 |",
        "| preferences of kind `both_ran` | 5 |", "| preferences of kind `ran_vs_failed` | 2 |",
        "| rows with pictures in the prompt | 2 |", "| preferences that rest on a simulated observation | 0 |",
        f"| {world.text_cycle} | 4 |", f"| {world.mixed_cycle} | 3 |", "| base | 7 |", "| 1-abc | 7 |",
        f"sha256 `{'0' * 64}`", f"sha256 `{'1' * 64}`", f"sha256 `{hashlib.sha256(rows.read_bytes()).hexdigest()}`",
        "Logged text was redacted before it was stored", "## Licence",
    ):  # fmt: skip
        assert said in card, said


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_corrections_and_thumbs_as_they_are(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    export(world, tmp_path / "data", "", monkeypatch)
    corrections, thumbs = (
        load_dataset(str(tmp_path / "data"), kind, split="train", cache_dir=str(tmp_path / "cache"))
        for kind in ("corrections", "thumbs")
    )
    assert corrections["completion"][0] == said("36"), "of an answer the latest cycle's row"
    assert sorted(thumbs["label"]) == [False, True]
    for trainer, config, dataset, batch in (
        (SFTTrainer, SFTConfig, corrections, 1),
        (KTOTrainer, KTOConfig, thumbs, 2),
    ):
        arguments = config(
            output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=batch, use_cpu=True, bf16=False,
            report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        model = AutoModelForImageTextToText.from_pretrained(SHOP_MODEL, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(SHOP_MODEL)
        made = trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        made.train()
        assert any("loss" in line for line in made.state.log_history)


def test_a_prompt_with_a_tools_picture_is_left_out() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a map"}]
    assert has_tool_pictures({"prompt": [{"role": "tool", "content": content}]})
    assert not has_tool_pictures({"prompt": [{"role": "user", "content": content}, {"role": "tool", "content": "x"}]})


def test_an_export_refuses_what_it_cannot_do_in_one_sentence(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(world.server.home))
    assert main([str(tmp_path)]) == 2
    assert "is there already: name a new folder" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--cycle", "cycle_0"]) == 2
    assert "cycle cycle_0 has no pairs to export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def run(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--home", str(world.server.home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_exports_a_folder(world: World, tmp_path: Path) -> None:
    done = run(world, "pairs", "export", str(tmp_path / "data"), "--cycle", world.text_cycle)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"4 preferences, 1 corrections, 1 thumbs in {tmp_path / 'data'}\n"
    lines = run(world, "pairs", "export", "--rows", "thumbs").stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == [True, False]
    assert run(world, "pairs", "export", str(tmp_path / "more"), "--output", "x").returncode == 2


def test_one_pair_is_shown_with_prompt_critique_and_lineage(world: World) -> None:
    listed = json.loads(run(world, "pairs", "list", "--cycle", world.text_cycle, "--json").stdout)
    both, failed = listed[1], listed[-1]
    shown = run(world, "pairs", "show", both["id"]).stdout
    for said in (
        both["id"], "both_ran", "decided by  judge", "margin      2.00", world.text_cycle, "1-abc",
        "[system]\n", "[user]\n", "[chosen]\n",
        both["chosen"], "[rejected]\n", both["rejected"], "(3 samples, 3 tokens, logprob -1.50)",
        "chosen first: first, +2.00 nats for the chosen; 'A'",
        "rejected first: second, +3.00 nats for the chosen; 'B'",
    ):  # fmt: skip
        assert said in shown, said
    facts = run(world, "pairs", "show", failed["id"]).stdout
    assert "decided by  facts" in facts
    assert "margin" not in facts
    assert "failed: execution" in facts
    assert "no judge was asked" in facts
    detail = json.loads(run(world, "pairs", "show", both["id"], "--json").stdout)
    assert [verdict["chosen_first"] for verdict in detail["verdicts"]] == [True, False]
    assert detail["chosen"]["token_ids"] == [7, 8, 9]
    unknown = run(world, "pairs", "show", "pair_0")
    assert unknown.returncode == 2
    assert "pair 'pair_0' is not known: see `nightschool pairs list`" in unknown.stderr
