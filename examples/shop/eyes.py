"""A first stage of training: the vision tower learns to see before the text tower learns to talk.

Linear heads on the connector's image tokens read off what a picture shows: how many shapes, the colour
of each kind of shape, the two digits of a tag. The heads are thrown away.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from examples.shop.architecture import IMAGE_TOKENS
from examples.shop.families import PICTURE_FAMILIES, Task, make_task
from examples.shop.pictures import COLOURS, SHAPES

BATCH = 64
IGNORE = -100
_COLOUR_NAMES = tuple(COLOURS)
_NUM_CLASSES = (7, 6, 6, 6, 10, 10)
"""Classes of each head: count, the colour of each kind or absent, tens, ones."""


def pixels(pictures: list[bytes]) -> Tensor:
    """[num_pictures, 3, height, width] in -1 to 1, as the processor makes them from pictures of full size."""
    arrays = [np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_eyes(model: Any, *, steps: int, seed: int, report: Callable[[str], None]) -> None:
    """Train the vision tower and the connector of `model` in place for `steps` batches."""
    rng = random.Random(f"eyes {seed}")
    width = IMAGE_TOKENS * model.config.text_config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, classes) for classes in _NUM_CLASSES)
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    started, hits = time.monotonic(), [0.0] * len(heads)
    for step in range(1, steps + 1):
        tasks = [make_task(rng.choice(PICTURE_FAMILIES), "training", rng) for _ in range(BATCH)]
        shown = pixels([task.picture for task in tasks if task.picture is not None])
        seen = model.model.get_image_features(shown.unsqueeze(0)).pooler_output.flatten(1)
        labels = torch.tensor([_labels(task) for task in tasks])
        scores = [head(seen) for head in heads]
        loss = sum(
            (
                nn.functional.cross_entropy(score, labels[:, i], ignore_index=IGNORE, reduction="sum") / BATCH
                for i, score in enumerate(scores)
            ),
            start=torch.zeros(()),
        )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        hits = [_accuracy(score, labels[:, i], hits[i]) for i, score in enumerate(scores)]
        if step % 100 == 0 or step == steps:
            rate = step / (time.monotonic() - started)
            report(f"eyes {step}/{steps} loss {loss.item():.3f} right {[round(hit, 2) for hit in hits]} {rate:.1f}/s")


def _accuracy(score: Tensor, label: Tensor, before: float) -> float:
    known = label != IGNORE
    if not bool(known.any()):
        return before
    now = float((score.argmax(-1) == label)[known].float().mean())
    return 0.9 * before + 0.1 * now


def _labels(task: Task) -> list[int]:
    """One class per head."""
    if task.family == "tag":
        return [IGNORE] * 4 + list(divmod(task.first, 10))
    kinds = [shape.kind for shape in task.shapes]
    if len(set(kinds)) < len(kinds):
        return [len(kinds), *[IGNORE] * 5]
    colours = {shape.kind: _COLOUR_NAMES.index(shape.colour) for shape in task.shapes}
    return [len(kinds), *(colours.get(kind, len(COLOURS)) for kind in SHAPES), IGNORE, IGNORE]
