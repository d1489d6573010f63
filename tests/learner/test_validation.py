"""What a run holds back, what its looks decide, and runs made to raise each alarm."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner.manifest import Alarm, AlarmLimits, Look
from nightschool_learner.validation import best_look, look_steps, no_gain, reason_to_stop, split_rows
from safetensors.torch import load_file

from tests.learner.training_data import anchor, change_pairs, finished, make_run, rewritten, text_pair

ALARM = Alarm(name="kl", value=1, limit=0.5, message="too far")


def looks(*losses: float, alarms_at: tuple[int, ...] = ()) -> list[Look]:
    return [
        Look(
            step=4 * i, loss=loss, margin=0, accuracy=0.5, anchor_nll=0, kl=0, length_ratio=1,
            alarms=(ALARM,) if i in alarms_at else (),
        )
        for i, loss in enumerate(losses)
    ]  # fmt: skip


def steps_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row and a second step of the same task."""
    turn = {"role": "assistant", "content": "Let me see."}
    return rows + [row | {"prompt": [*row["prompt"], turn, {"role": "tool", "content": "7"}]} for row in rows]


def test_whole_tasks_are_held_back_with_their_anchors() -> None:
    rng = random.Random(1)
    pairs = steps_of([text_pair(rng) for _ in range(20)])
    anchors = [row | {"answer": row["chosen"]} for row in pairs[20:30]] + [anchor(rng) for _ in range(30)]
    held_pairs, held_anchors = split_rows(pairs, anchors, 0.2, seed=5)
    assert len(held_pairs) == 8
    assert {i % 20 for i in held_pairs} == {i for i in held_pairs if i < 20}
    assert {i + 20 for i in held_anchors if i < 10} == {i for i in held_pairs if 20 <= i < 30}
    assert len(held_anchors) == 8
    assert split_rows(pairs, anchors, 0.2, seed=5) == (held_pairs, held_anchors)
    assert split_rows(pairs, anchors, 0.2, seed=6) != (held_pairs, held_anchors)


def test_few_pairs_are_all_trained_on_and_a_small_share_is_at_least_four() -> None:
    rng = random.Random(2)
    pairs = [text_pair(rng) for _ in range(16)]
    assert split_rows(pairs[:15], [], 0.4, seed=1) == (frozenset(), frozenset())
    assert split_rows(pairs, [], 0.0, seed=1) == (frozenset(), frozenset())
    assert len(split_rows(pairs, [], 0.1, seed=1)[0]) == 4


def test_looks_are_spread_up_to_the_last_step() -> None:
    assert look_steps(10, 4) == {3, 5, 8, 10}
    assert look_steps(2, 4) == {1, 2}


@pytest.mark.parametrize(
    ("losses", "alarms_at", "best", "best_sound"),
    [
        ((1.0, 0.8, 0.7), (), 8, 8),
        ((1.0, 0.8, 0.9), (), 4, 4),
        ((1.0, 0.8, 0.7), (2,), 8, 4),
        ((1.0, 0.8, math.nan), (), 4, 4),
        ((1.0, 0.8, 0.8), (), 4, 4),
        ((1.0, 1.2, 1.1), (), 0, 0),
        ((1.0, 0.8, 0.7), (1, 2), 8, 0),
    ],
)
def test_the_best_look_is_the_first_of_least_loss(
    losses: tuple[float, ...], alarms_at: tuple[int, ...], best: int, best_sound: int
) -> None:
    found = looks(*losses, alarms_at=alarms_at)
    chosen, sound = best_look(found), best_look(found, sound_only=True)
    assert (chosen and chosen.step, sound and sound.step) == (best, best_sound)
    assert (no_gain(found) is None) == (best > 0)
    assert (no_gain(found, sound_only=True) is None) == (best_sound > 0)


def test_no_look_is_no_verdict() -> None:
    assert (best_look([]), no_gain([]), reason_to_stop([], 1, stops_on_alarm=True)) == (None, None, "")


def test_training_ends_when_looks_get_no_better_or_one_raises_an_alarm() -> None:
    assert reason_to_stop(looks(1.0, 0.8, 0.9), 2, stops_on_alarm=True) == ""
    assert "for 2 looks" in reason_to_stop(looks(1.0, 0.8, 0.9, 0.85), 2, stops_on_alarm=True)
    assert reason_to_stop(looks(1.0, 0.8, 0.9, 0.85), 0, stops_on_alarm=True) == ""
    alarmed = looks(1.0, 0.8, alarms_at=(1,))
    assert reason_to_stop(alarmed, 2, stops_on_alarm=True) == "step 4: too far"
    assert reason_to_stop(alarmed, 2, stops_on_alarm=False) == ""


FIERCE = {
    "epochs": 10,
    "learning_rate": 2e-2,
    "batch_size": 8,
    "nll_weight": 0.0,
    "validation_share": 0.25,
    "num_looks": 2,
}


def test_a_run_that_runs_away_raises_its_alarms_and_keeps_its_best_weights(tmp_path: Path) -> None:
    """Minus is right and plus is wrong, far too hard: sums, which are held back, lose what they had."""
    limits = AlarmLimits(max_drift=30.0, max_margin=3.0)
    manifest = make_run(tmp_path, num_text=16, num_pictures=0, num_anchors=12, anchor_weight=1e-6, **FIERCE)
    run = finished(rewritten(manifest, limits=limits))
    raised = {alarm.name for look in run.result.looks for alarm in look.alarms}
    assert {"kl", "anchor_fall", "drift", "saturation"} <= raised
    assert run.result.num_held_back == 4
    assert run.result.kept_step == min(run.result.looks, key=lambda look: look.loss).step
    assert not run.folder.looks.exists()

    stopping = make_run(
        tmp_path / "stops",
        num_text=16,
        num_pictures=0,
        num_anchors=12,
        anchor_weight=1e-6,
        **(FIERCE | {"batch_size": 8}),
    )
    stopped = finished(rewritten(stopping, limits=limits.model_copy(update={"stops": True})))
    first = next(look for look in stopped.result.looks if look.alarms)
    assert stopped.result.looks[-1] == first
    assert stopped.result.stopped.startswith(f"step {first.step}: ")
    assert stopped.result.num_steps < run.result.num_steps


def test_a_run_that_teaches_long_answers_raises_the_alarm_of_length(tmp_path: Path) -> None:
    def longer(_: int, row: dict[str, Any]) -> dict[str, Any]:
        told = " ".join(["calculator"] * 8)
        return row | {"chosen": [{"role": "assistant", "content": told}]}

    manifest = make_run(
        tmp_path,
        num_text=16,
        num_pictures=0,
        **(FIERCE | {"nll_weight": 1.0, "learning_rate": 5e-3, "num_looks": 1, "batch_size": 4}),
    )
    limits = AlarmLimits(max_length_drift=1.2)
    run = finished(rewritten(change_pairs(manifest, longer), limits=limits))
    assert run.result.looks[-1].length_ratio > 1.2
    assert "length_drift" in {alarm.name for alarm in run.result.looks[-1].alarms}


def test_a_run_that_makes_what_it_held_back_worse_keeps_nothing(tmp_path: Path) -> None:
    """The held-back pairs say the opposite of those that are trained on."""
    manifest = make_run(
        tmp_path, num_text=20, num_pictures=0, validation_share=0.2, epochs=4, nll_weight=0.0, num_looks=3
    )
    rows = [json.loads(line) for line in manifest.pairs_file.read_text().splitlines()]
    held, _ = split_rows(rows, [], 0.2, manifest.seed)

    def turned(index: int, row: dict[str, Any]) -> dict[str, Any]:
        sides = {"chosen": row["rejected"], "rejected": row["chosen"]}
        return row | sides if index in held else row

    run = finished(change_pairs(manifest, turned))
    assert run.result.metrics["rewards/accuracies"] > 0.8, "it learned what it was shown"
    (alarm,) = [alarm for alarm in run.result.alarms if alarm.name == "validation"]
    assert alarm.value > alarm.limit
    assert alarm.message.startswith("the held-back loss is ")
    assert run.result.kept_step == run.result.num_steps
    assert any(
        bool(t.any())
        for n, t in load_file(run.result.adapter_folder / "adapter_model.safetensors").items()
        if ".lora_B." in n
    )
