"""SFT and KTO on the same tokens as DPO, and what callers said among what is learned."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner.bundle import pack, unpack
from nightschool_learner.manifest import Manifest, RunFolder
from nightschool_learner.trainer_answers import AnswerCollator
from nightschool_learner.trainer_data import ANCHORS
from nightschool_learner.trainer_methods import make_trainer
from nightschool_learner.trainer_model import load_student
from nightschool_learner.trainer_rows import read_material

from tests.learner.training_data import MODEL, Trained, finished, make_run, rewritten, text_pair

TOLD = "Please ask at the counter."


def with_feedback(manifest: Manifest) -> Manifest:
    """The run with three corrections, two thumbs up and four down."""
    rng, changes = random.Random(9), {}
    rows = [text_pair(rng) for _ in range(9)]
    said = [{"role": "assistant", "content": TOLD}]
    files: dict[str, list[dict[str, Any]]] = {
        "corrections": [{**row, "completion": said} for row in rows[:3]],
        "thumbs": [{**row, "completion": row["chosen"], "label": i < 2} for i, row in enumerate(rows[3:])],
    }
    for name, lines in files.items():
        path = manifest.pairs_file.parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes |= {f"{name}_file": path, f"{name}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return rewritten(manifest, **changes)


def run(folder: Path, method: str, **wanted: Any) -> Trained:
    made = make_run(
        folder, method=method, anchor_weight=0.1, num_anchors=8, num_looks=2, validation_share=0.25, **wanted
    )
    return finished(with_feedback(made))


def test_sft_learns_chosen_answers_and_corrections(tmp_path: Path) -> None:
    trained = run(tmp_path, "sft", num_text=14, num_pictures=4, epochs=6, learning_rate=3e-3)
    result, rows = trained.result, trained.folder.read_metrics()
    assert (result.num_pairs, result.num_told) == (18, 3)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    start, *_, end = result.looks
    assert (start.kl, start.margin) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-5))
    assert end.loss < start.loss
    assert end.margin > 0.1, "what is chosen gains on what is not, though nobody said what is not"


def test_kto_learns_from_each_answer_what_pairs_and_thumbs_say(tmp_path: Path) -> None:
    trained = run(tmp_path, "kto", num_text=14, num_pictures=4, epochs=6, learning_rate=3e-3)
    result, rows = trained.result, trained.folder.read_metrics()
    assert (result.num_pairs, result.num_told) == (18, 3 + 6)
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["rewards/chosen"] > 0 > result.metrics["rewards/rejected"]
    assert result.looks[-1].accuracy > 0.7


def test_sft_of_a_continued_adapter_keeps_its_start_as_reference(trained: Trained, tmp_path: Path) -> None:
    parent = trained.result.adapter_folder
    more = run(tmp_path, "sft", num_text=16, num_pictures=0, epochs=1, parent=parent, learning_rate=1e-3)
    assert more.result.looks[0].kl == pytest.approx(0, abs=1e-6)
    assert more.result.looks[-1].kl > 0
    assert sorted(path.name for path in more.result.adapter_folder.iterdir())[0] == "adapter_config.json"


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_batches_hold_exactly_the_tokens_of_the_rows(method: str, tmp_path: Path) -> None:
    manifest = with_feedback(make_run(tmp_path, num_text=3, num_pictures=2, method=method))
    student = load_student(manifest, "cpu")
    material = read_material(manifest, student)
    collate = material.batches
    assert isinstance(collate, AnswerCollator)
    assert sum(answer.is_good for answer in collate.answers) == 5 + 3 + 2 * (method == "kto")
    assert len(collate.answers) == (5 + 3 if method == "sft" else 10 + 3 + 6)
    rows = [material.dataset(held_back=False)[i] for i in range(len(collate.answers))]
    batch = collate(rows)
    for ids, mask, answer in zip(batch["input_ids"], batch["completion_mask"], collate.answers, strict=True):
        assert ids[mask.bool()].tolist() == answer.encoded.answer_ids
        assert ids[: len(answer.encoded.prompt_ids)].tolist() == answer.encoded.prompt_ids
    told = [
        student.loaded.tokenizer.decode(answer.encoded.answer_ids) for answer in collate.answers if answer.pair is None
    ]
    assert sum(TOLD in text for text in told) == 3
    if method == "sft":
        assert ((batch["labels"] == -100) == (batch["completion_mask"] == 0)).all()
        return
    for i, (ids, mask) in enumerate(zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)):
        assert ids[mask.bool()].tolist() == collate.answers[i - 1].encoded.answer_ids
    assert batch["label"].tolist() == [answer.is_good for answer in collate.answers]


def test_corrections_are_anchors_of_a_run_on_pairs_and_thumbs_are_not(tmp_path: Path) -> None:
    manifest = with_feedback(make_run(tmp_path, num_text=4, num_pictures=0, num_anchors=2, anchor_weight=0.5))
    student = load_student(manifest, "cpu")
    material = read_material(manifest, student)
    trainer = make_trainer(student, material, manifest, [])
    dealt = [i for row in trainer.train_dataset for i in row[ANCHORS]]
    assert sorted(dealt) == [0, 1, 2, 3, 4]
    assert material.num_told == 3


def test_another_host_gets_what_callers_said(tmp_path: Path) -> None:
    manifest = with_feedback(make_run(tmp_path / "here", num_text=2, num_pictures=1, method="kto"))
    pack(RunFolder(manifest.output), tmp_path / "run.tar")
    there = unpack(tmp_path / "run.tar", tmp_path / "there", str(MODEL)).read_manifest()
    for name in ("pairs", "corrections", "thumbs"):
        file = getattr(there, f"{name}_file")
        assert file.is_relative_to(tmp_path / "there")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == getattr(there, f"{name}_sha256")
    assert there.anchors_file is None
