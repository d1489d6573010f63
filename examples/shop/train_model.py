"""Make the practice dummy from scratch: `python -m examples.shop.train_model --out DIR`.

A tokenizer from the lessons' text, an untrained Idefics3, a first stage for its eyes, then one joint
stage in three roles (agent, critic, writer), loss on the assistant's tokens alone. Seeded; float32 on
the CPU; the weights are stored as bfloat16 and served as float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nightschool_learner.prompts import TEMPLATES_DIGEST
from nightschool_server.chat import canonical_json
from torch import Tensor, nn

from examples.shop.architecture import CHAT_TEMPLATE, IM_END, IM_START, make_model, make_processor, train_tokenizer
from examples.shop.eyes import pixels, train_eyes
from examples.shop.lessons import Lesson, make_lesson, render
from examples.shop.toolbox import SYSTEM_PROMPT, TOOLS

IGNORE = -100
TOKENIZER_LESSONS = 4000
CHUNK_BATCHES = 64
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast."""

    seed: int = 7
    eyes_steps: int = 600
    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    vision_rate: float = 0.3
    """Of the learning rate, for the vision tower in the joint stage."""


@dataclass(frozen=True)
class Batch:
    """Lessons of like length."""

    tokens: Tensor
    """[batch, length], padded on the right."""
    labels: Tensor
    """[batch, length - 1]: the token that follows each position, IGNORE outside the assistant's turns."""
    images: Tensor | None
    """[1, num_images, 3, height, width], in the order in which the batch shows them."""


def prompts_digest() -> str:
    """sha256 over all that the model's prompts are made from: if it changes, train again."""
    tools = [asdict(tool) for tool in TOOLS]
    made_from = [TEMPLATES_DIGEST, SYSTEM_PROMPT, tools, CHAT_TEMPLATE.read_text()]
    return hashlib.sha256(canonical_json(made_from).encode()).hexdigest()


def train(recipe: Recipe, out: Path) -> None:
    """Train by `recipe` and write the model's folder to `out`."""
    started = time.monotonic()
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    bare = make_processor(train_tokenizer([]))
    tokenizer = train_tokenizer(render(make_lesson(rng), bare) for _ in range(TOKENIZER_LESSONS))
    processor = make_processor(tokenizer)
    model = make_model(tokenizer)
    _report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train_eyes(model, steps=recipe.eyes_steps, seed=recipe.seed, report=_report)
    _train_jointly(model, recipe, batches(processor, recipe, rng))
    save(model, processor, recipe, out)
    _report(f"wrote {out} after {time.monotonic() - started:.0f} s")


def save(model: Any, processor: Any, recipe: Recipe, out: Path) -> None:
    """Write weights (bfloat16 on disk, float32 in the configuration), processor and `training.json`."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("config.json",):
        config = json.loads((out / name).read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "float32"
        (out / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)
    record = {"recipe": asdict(recipe), "templates_digest": TEMPLATES_DIGEST, "prompts_digest": prompts_digest()}
    (out / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def batches(processor: Any, recipe: Recipe, rng: random.Random) -> Iterator[Batch]:
    """Endless batches, each of lessons of like length."""
    while True:
        lessons = [make_lesson(rng) for _ in range(CHUNK_BATCHES * recipe.batch)]
        encoded = processor.tokenizer([render(lesson, processor) for lesson in lessons])["input_ids"]
        order = sorted(range(len(lessons)), key=lambda i: len(encoded[i]))
        groups = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
        rng.shuffle(groups)
        for group in groups:
            yield collate([encoded[i] for i in group], [lessons[i] for i in group], processor.tokenizer)


def collate(encoded: list[list[int]], lessons: list[Lesson], tokenizer: Any) -> Batch:
    """Pad on the right and mark the assistant's tokens."""
    longest = max(len(tokens) for tokens in encoded)
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in encoded])
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in _labels(encoded, tokenizer)])
    pictures = [picture for lesson in lessons for picture in lesson.pictures]
    return Batch(tokens, labels[:, 1:], pixels(pictures).unsqueeze(0) if pictures else None)


def _labels(encoded: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The tokens of each row, IGNORE where the assistant does not speak; its newline after the end counts."""
    opening = tokenizer.encode(f"{IM_START}assistant\n")
    closing = tokenizer.convert_tokens_to_ids(IM_END)
    rows = []
    for row in encoded:
        labels, place = [IGNORE] * len(row), 0
        while place < len(row):
            if row[place : place + len(opening)] == opening:
                begin = place + len(opening)
                end = min(row.index(closing, begin) + 2, len(row))
                labels[begin:end] = row[begin:end]
                place = end
            else:
                place += 1
        rows.append(labels)
    return rows


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean over rows of each row's mean loss, so that a verdict of one token weighs as much as an episode."""
    hidden = model.model(input_ids=batch.tokens, pixel_values=batch.images).last_hidden_state[:, :-1]
    spoken = batch.labels != IGNORE
    losses = nn.functional.cross_entropy(model.lm_head(hidden[spoken]), batch.labels[spoken], reduction="none")
    weights = (spoken / spoken.sum(1, keepdim=True).sqrt())[spoken]
    return (losses * weights).sum() / weights.sum()


def _train_jointly(model: Any, recipe: Recipe, source: Iterator[Batch]) -> None:
    seeing = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    known = {id(parameter) for parameter in seeing}
    talking = [parameter for parameter in model.parameters() if id(parameter) not in known]
    rates = [recipe.learning_rate * recipe.vision_rate, recipe.learning_rate]
    optimizer = torch.optim.AdamW(
        [{"params": seeing}, {"params": talking}], betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=recipe.steps, pct_start=recipe.warm_up / recipe.steps, final_div_factor=100
    )
    started, smooth = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        loss = loss_of(model, next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == recipe.steps:
            passed = time.monotonic() - started
            left = passed / step * (recipe.steps - step)
            _report(f"joint {step}/{recipe.steps} loss {smooth:.4f} {passed:.0f} s, {left:.0f} s left")


def _report(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    train(Recipe(**{name: value for name, value in options.items() if name != "out"}), options["out"])


if __name__ == "__main__":
    main()
