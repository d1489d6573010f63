"""What counts as held out: every set that the home knows, in any dress, and nothing that only resembles it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool_learner import seed_records
from nightschool_learner.contamination import held_out_of
from nightschool_learner.picture_index import Looks
from nightschool_learner.screening import Pool, task_key
from nightschool_learner.seeds import choose_seeds
from nightschool_learner.stages import Cycle
from nightschool_server.config.practice import SeedsConfig
from nightschool_server.config.screening import ScreenConfig
from nightschool_server.errors import ConfigError
from nightschool_server.store.store import Store
from PIL import Image

from examples.shop.pictures import draw_tag
from tests.learner.practice_home import cycle_on, log_request, open_home

QUESTIONS = (
    "Put 4 of the plain mirror in the basket for Grace and tell its total.",
    "How many of the new teapot are left for Noah?",
    "Which of the two letters from the bank came first?",
)
TAG, OTHER_TAG = draw_tag(41, "red", (0, 0)), draw_tag(56, "blue", (1, 0))


def recompressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize((160, 160)).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def write_set(path: Path, *prompts: str, picture: bytes = b"") -> Path:
    lines = [{"id": str(i), "family": "f", "prompt": prompt, "answer": "1"} for i, prompt in enumerate(prompts)]
    if picture:
        path.with_suffix(".png").write_bytes(picture)
        lines.append(
            {
                "id": "tag",
                "family": "f",
                "prompt": "What does one cost?",
                "answer": "1",
                "images": [path.with_suffix(".png").name],
            }
        )
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path / "home")


def cycle_with(store: Store, evaluation: Path | None, *overrides: str) -> Cycle:
    cycle = cycle_on(store, *overrides)
    return replace(cycle, app=replace(cycle.app, evaluation=evaluation))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Put 4 of the plain mirrors in the basket for Grace, tell its total!", "similar"),
        ("How many of the new teapots are left for Noah", "similar"),
        ("Put 5 of the plain mirrors in the basket for Grace, tell its total!", None),
        ("Put 4 of the round clock in the basket for Leo and tell its total.", None),
        ("What does one cost?", None),
    ],
)
def test_a_reworded_held_out_task_is_one_and_one_with_other_numbers_or_things_is_not(
    store: Store, tmp_path: Path, text: str, reason: str | None
) -> None:
    cycle = cycle_with(store, write_set(tmp_path / "set.jsonl", *QUESTIONS, picture=TAG))
    assert held_out_of(cycle).match(task_key(text)) == reason
    off = cycle_with(store, cycle.app.evaluation, "screen.max_held_out_similarity=1")
    assert held_out_of(off).match(task_key(text)) is None


def test_a_held_out_picture_is_known_after_it_was_scaled_and_recompressed(store: Store, tmp_path: Path) -> None:
    evaluation = write_set(tmp_path / "set.jsonl", *QUESTIONS, picture=TAG)
    changed, other = (store.put_blob(recompressed(data), "image/jpeg") for data in (TAG, OTHER_TAG))
    held_out = held_out_of(cycle_with(store, evaluation))
    assert held_out.match(task_key("Read the tag", [changed])) == "image_similar"
    assert held_out.match(task_key("Read the tag", [other])) is None
    assert held_out.match(task_key("Read the tag", ["0" * 64])) is None, "its bytes are gone"
    off = held_out_of(cycle_with(store, evaluation, "screen.max_image_distance=-1"))
    assert off.match(task_key("Read the tag", [changed])) is None


def test_tasks_of_an_earlier_version_stay_held_out(store: Store, tmp_path: Path) -> None:
    held_out_of(cycle_with(store, write_set(tmp_path / "set.jsonl", QUESTIONS[0], picture=TAG)))
    (tmp_path / "set.png").unlink()
    newer = write_set(tmp_path / "newer.jsonl", QUESTIONS[1])
    picture = store.put_blob(recompressed(TAG), "image/jpeg")
    asked = [task_key(QUESTIONS[0]), task_key(QUESTIONS[1]), task_key("Read the tag", [picture])]
    held_out = held_out_of(cycle_with(store, newer))
    assert [held_out.match(key) for key in asked] == ["text", "text", "image_similar"]
    without = held_out_of(cycle_with(store, newer, "screen.earlier_sets=false"))
    assert [without.match(key) for key in asked] == [None, "text", None]
    held_out_of(cycle_with(store, newer))
    assert len(store.query("SELECT * FROM held_out_tasks")) == 3, "each is kept once"


def test_further_files_are_held_out_too(store: Store, tmp_path: Path) -> None:
    benchmark = write_set(tmp_path / "benchmark.jsonl", QUESTIONS[2], picture=TAG)
    cycle = cycle_with(store, None, f'screen.held_out_files=["{benchmark}"]')
    assert held_out_of(cycle).match(task_key("which of the two letters from the bank came first")) == "text"
    with pytest.raises(ConfigError, match=r"held_out_files names 'nowhere\.jsonl'"):
        held_out_of(cycle_with(store, None, 'screen.held_out_files=["nowhere.jsonl"]'))


def test_a_request_that_is_nearly_a_held_out_task_is_no_seed(store: Store, tmp_path: Path) -> None:
    log_request(store, "a", "How many of the new teapots are left for Noah")
    log_request(store, "b", "How many of the red lamps are left for Emma")
    held_out = held_out_of(cycle_with(store, write_set(tmp_path / "set.jsonl", *QUESTIONS)))
    chosen = choose_seeds(seed_records.trainable_requests(store, 10), held_out, SeedsConfig())
    assert [seed.prompt for seed in chosen.seeds] == ["How many of the red lamps are left for Emma"]
    assert chosen.dropped == {"held_out": 1}


@pytest.mark.parametrize(
    ("text", "picture", "reason"),
    [
        ("put 4 of the plain mirror in the basket for grace and tell its total", None, "duplicate"),
        ("Put 4 of the plain mirrors in the basket for Grace, and tell its total!", None, "near_duplicate"),
        ("Put 6 of the plain mirrors in the basket for Grace, and tell its total!", None, None),
        ("Take 2 at the price on the tag. What is the total?", TAG, "duplicate"),
        ("Take 2 at the price of the tag. What is the total?", TAG, "near_duplicate"),
        ("Take 2 at the price on the tag. What is the total?", recompressed(TAG), "near_duplicate"),
        ("Take 2 at the price on the tag. What is the total?", OTHER_TAG, None),
        ("Take 2 at the price on the tag. What is the total?", None, None),
    ],
)
def test_a_task_that_is_nearly_there_already_is_no_new_one(
    store: Store, text: str, picture: bytes | None, reason: str | None
) -> None:
    pool = Pool(ScreenConfig(), [], Looks(store.get_blob))
    pool.add(task_key(QUESTIONS[0]))
    pool.add(task_key("Take 2 at the price on the tag. What is the total?", [store.put_blob(TAG, "image/png")]))
    images = [store.put_blob(picture, "image/png")] if picture else []
    assert pool.match(task_key(text, images)) == reason


def test_nearness_can_be_switched_off(store: Store) -> None:
    words_only = Pool(ScreenConfig(max_task_similarity=1), [], Looks(store.get_blob))
    words_only.add(task_key(QUESTIONS[0]))
    assert words_only.match(task_key(QUESTIONS[0] + " Please.")) is None
    assert words_only.match(task_key(QUESTIONS[0].upper())) == "duplicate"
