"""The second stage of training: the vision tower learns to see, and to say it in words.

Each image token is trained toward the text tower's embeddings of what the picture shows: how many shapes there
are, then each kind of shape together with its colour, so that a question for the kind finds the colour; of a
price tag, its two digits. What the text tower has learned to do with words it can then do with pictures. Things
a picture does not have are not trained.
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
from examples.shop.pictures import SHAPES

BATCH = 64
IGNORE = -100
MATRIX_RATE = 4e-3
RATE = 1.5e-3
SHARPNESS = 20.0
"""Scores are this times the cosine between an image token and a word's embedding."""


def pixels(pictures: list[bytes]) -> Tensor:
    """[num_pictures, 3, height, width] in -1 to 1, as the processor makes them from pictures of full size."""
    arrays = [np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_eyes(model: Any, tokenizer: Any, *, steps: int, seed: int, report: Callable[[str], None]) -> None:
    """Train the vision tower and the connector of `model` in place for `steps` batches."""
    rng = random.Random(f"eyes {seed}")
    words = model.get_input_embeddings().weight.detach()
    usual_norm = words.norm(dim=-1).mean()
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    matrices = [parameter for parameter in model.model.vision_model.encoder.parameters() if parameter.ndim == 2]
    known_ids = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in known_ids]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.01),
    ]
    started, right = time.monotonic(), torch.zeros(IMAGE_TOKENS)
    for step in range(1, steps + 1):
        tasks = [make_task(rng.choice(PICTURE_FAMILIES), "training", rng) for _ in range(BATCH)]
        labels = torch.tensor([_words(task, tokenizer) for task in tasks])
        known = labels[..., 0] != IGNORE
        shown = pixels([task.picture for task in tasks if task.picture is not None])
        seen = model.model.get_image_features(shown.unsqueeze(0)).pooler_output
        cosines = nn.functional.normalize(seen, dim=-1) @ nn.functional.normalize(words, dim=-1).T
        said = (SHARPNESS * cosines[known]).log_softmax(-1).gather(-1, labels[known])
        loss = -said.mean()
        loss = loss + ((seen.norm(dim=-1) / usual_norm - 1) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in zip(optimizers, (MATRIX_RATE, RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, step / 50, 2.0 * (1.02 - step / steps))
            optimizer.step()
            optimizer.zero_grad()
        hits = (_nearest(cosines, labels.clamp(min=0)) & known).sum(0) / known.sum(0)
        right = hits if step == 1 else 0.95 * right + 0.05 * hits
        if step % 100 == 0 or step == steps:
            rate = step / (time.monotonic() - started)
            shares = [round(share, 2) for share in right.tolist()]
            report(f"eyes {step}/{steps} loss {loss.item():.3f} right {shares} {rate:.1f}/s")


def _nearest(cosines: Tensor, labels: Tensor) -> Tensor:
    """[batch, tokens]: whether no other word is nearer than the words in `labels`, [batch, tokens, 2]."""
    farthest = cosines.gather(-1, labels).amin(-1, keepdim=True)
    words = 1 + (labels[..., 0] != labels[..., 1]).long()
    return (cosines >= farthest).sum(-1) == words


def _words(task: Task, tokenizer: Any) -> list[tuple[int, int]]:
    """The two words of each image token, the same one twice where there is one, IGNORE where there is none."""
    said: list[tuple[str, str] | None]
    if task.family == "tag":
        said = [*((digit, digit) for digit in str(task.first)), None, None]
    else:
        kinds = [shape.kind for shape in task.shapes]
        colours = {shape.kind: shape.colour for shape in task.shapes} if len(set(kinds)) == len(kinds) else {}
        number = str(len(kinds))
        said = [(number, number), *((f"Ġ{kind}", colours[kind]) if kind in colours else None for kind in SHAPES)]
    ids = tokenizer.convert_tokens_to_ids
    return [(IGNORE, IGNORE) if words is None else (ids(words[0]), ids(words[1])) for words in said]
