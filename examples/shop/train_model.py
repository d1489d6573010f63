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
from transformers import DynamicCache

from examples.shop.architecture import CHAT_TEMPLATE, IM_END, IM_START, make_model, make_processor, train_tokenizer
from examples.shop.copying import train_copying
from examples.shop.eyes import pixels, train_eyes
from examples.shop.lessons import ROLE_SHARES, Lesson, any_lesson, make_lesson, render
from examples.shop.toolbox import SYSTEM_PROMPT, TOOLS

IGNORE = -100
TOKENIZER_LESSONS = 4000
CHUNK_BATCHES = 64
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast."""

    seed: int = 7
    copying_steps: int = 1200
    eyes_steps: int = 1400
    steps: int = 4000
    batch: int = 16
    matrix_rate: float = 4e-3
    rate: float = 2e-3
    warm_up: int = 60
    weight_decay: float = 0.05


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
    # What a chat template is shown of a tool; how its calls are sampled is no part of a prompt.
    tools = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in TOOLS]
    made_from = [TEMPLATES_DIGEST, SYSTEM_PROMPT, tools, CHAT_TEMPLATE.read_text()]
    return hashlib.sha256(canonical_json(made_from).encode()).hexdigest()


def train(recipe: Recipe, out: Path) -> None:
    """Train by `recipe` and write the model's folder to `out`."""
    started = time.monotonic()
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    bare = make_processor(train_tokenizer([]))
    tokenizer = train_tokenizer(render(any_lesson(rng), bare) for _ in range(TOKENIZER_LESSONS))
    processor = make_processor(tokenizer)
    model = make_model(tokenizer)
    _report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train_copying(model, tokenizer, steps=recipe.copying_steps, seed=recipe.seed, report=_report)
    train_eyes(model, tokenizer, steps=recipe.eyes_steps, seed=recipe.seed, report=_report)
    _train_jointly(model, recipe, batches(processor, recipe, rng))
    save(model, processor, recipe, out)
    _report(f"wrote {out} after {time.monotonic() - started:.0f} s")


def save(model: Any, processor: Any, recipe: Recipe, out: Path) -> None:
    """Write weights (bfloat16 on disk, float32 in the configuration), processor and `training.json`."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)
    record = {"recipe": asdict(recipe), "templates_digest": TEMPLATES_DIGEST, "prompts_digest": prompts_digest()}
    (out / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def batches(processor: Any, recipe: Recipe, rng: random.Random) -> Iterator[Batch]:
    """Endless batches, each of one role and of lessons of like length."""
    while True:
        groups: list[list[Lesson]] = []
        for role, share in ROLE_SHARES.items():
            count = round(CHUNK_BATCHES * share)
            lessons = [make_lesson(role, rng) for _ in range(count * recipe.batch)]
            lessons.sort(key=lambda lesson: len(render(lesson, processor)))
            groups.extend(lessons[i * recipe.batch : (i + 1) * recipe.batch] for i in range(count))
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, processor)


def collate(lessons: list[Lesson], processor: Any) -> Batch:
    """Pad on the right and mark the assistant's tokens."""
    tokenizer = processor.tokenizer
    encoded = tokenizer([render(lesson, processor) for lesson in lessons])["input_ids"]
    longest = max(len(tokens) for tokens in encoded)
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in encoded])
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in _labels(encoded, lessons, tokenizer)])
    pictures = [picture for lesson in lessons for picture in lesson.pictures]
    return Batch(tokens, labels[:, 1:], pixels(pictures).unsqueeze(0) if pictures else None)


def _labels(encoded: list[list[int]], lessons: list[Lesson], tokenizer: Any) -> list[list[int]]:
    """The tokens of each row, IGNORE where the assistant does not speak; its newline after the end counts."""
    opening = tokenizer.encode(f"{IM_START}assistant\n")
    closing = tokenizer.convert_tokens_to_ids(IM_END)
    rows = []
    for row, lesson in zip(encoded, lessons, strict=True):
        labels, place = [IGNORE] * len(row), 0
        while place < len(row):
            if row[place : place + len(opening)] == opening:
                begin = place + len(opening)
                end = begin + 1 if lesson.first_token_only else min(row.index(closing, begin) + 2, len(row))
                labels[begin:end] = row[begin:end]
                place = end
            else:
                place += 1
        rows.append(labels)
    return rows


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean loss per spoken token, rows weighted by the root of their length so that short answers count.

    The tokens that all rows begin with (system prompt and tools) run once and are shared through the
    key-value cache: the same gradient at half the cost.
    """
    shared = common_prefix(batch.tokens, model.config.image_token_id)
    cache = DynamicCache(config=model.config.text_config)
    model.model(input_ids=batch.tokens[:1, :shared], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch.tokens))
    rest = model.model(
        input_ids=batch.tokens[:, shared:], pixel_values=batch.images, past_key_values=cache, use_cache=True
    )
    labels = batch.labels[:, shared:]
    spoken = labels != IGNORE
    hidden = rest.last_hidden_state[:, :-1][spoken]
    losses = nn.functional.cross_entropy(model.lm_head(hidden), labels[spoken], reduction="none")
    weights = (spoken / spoken.sum(1, keepdim=True).sqrt())[spoken]
    return (losses * weights).sum() / weights.sum()


def common_prefix(tokens: Tensor, image_token: int) -> int:
    """How many tokens all rows of [batch, length] begin with before any picture; at least 1, not all."""
    ends = (tokens != tokens[:1]).any(0) | (tokens[0] == image_token)
    ends[-1] = True
    return max(1, int(ends.int().argmax()))


def _train_jointly(model: Any, recipe: Recipe, source: Iterator[Batch]) -> None:
    optimizers = _optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, smooth = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / recipe.steps, recipe.warm_up / recipe.steps)
        loss = loss_of(model, next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0 or step == recipe.steps:
            passed = time.monotonic() - started
            left = passed / step * (recipe.steps - step)
            _report(f"joint {step}/{recipe.steps} loss {smooth:.4f} {passed:.0f} s, {left:.0f} s left")


def schedule(progress: float, warm_up: float) -> float:
    """Share of the peak rate: a linear rise, a plateau to the middle, a linear fall to a fiftieth."""
    if progress < warm_up:
        return progress / warm_up
    return 1.0 if progress < 0.5 else max(0.02, 2.0 * (1.0 - progress))


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the text tower's matrices, which learns to copy three times sooner than AdamW; AdamW for the rest.

    The eyes stay as they are: while the lessons are still noise, their gradient makes the image tokens collapse.
    """
    for part in (model.model.vision_model, model.model.connector):
        part.requires_grad_(False)
    matrices = [parameter for parameter in model.model.text_model.layers.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.model.text_model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


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
