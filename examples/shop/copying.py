"""The first stage of training: the text tower learns to copy, before it learns what for.

Most of what the assistant does is to take a name or a number from one place to another. Sequences that
are said twice, and look-ups of numbers by words, teach that in a minute; from the lessons alone it
takes ten.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 32
IGNORE = -100
LEARNED = 0.85
"""Share of the tokens said rightly, averaged over the last batches, at which the stage ends."""


def train_copying(model: Any, tokenizer: Any, *, steps: int, seed: int, report: Callable[[str], None]) -> None:
    """Train the text tower of `model` in place until it has LEARNED to copy, for at most `steps` batches."""
    rng = random.Random(f"copying {seed}")
    pieces = _Pieces(tokenizer)
    parameters = list(model.model.text_model.parameters())
    matrices = [parameter for parameter in model.model.text_model.layers.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=4e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    right = 0.0
    for step in range(1, steps + 1):
        tokens, labels = _batch(pieces, rng)
        spoken = labels != IGNORE
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1][spoken]
        scores = model.lm_head(hidden)
        loss = nn.functional.cross_entropy(scores, labels[spoken])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        right = 0.95 * right + 0.05 * float((scores.argmax(-1) == labels[spoken]).float().mean())
        if step % 50 == 0 or step == steps or right >= LEARNED:
            report(f"copying {step}/{steps} loss {loss.item():.3f} right {right:.2f}")
        if right >= LEARNED:
            return


class _Pieces:
    """The tokens that are worth copying: digits, and words with the form they have inside quotes."""

    def __init__(self, tokenizer: Any) -> None:
        self.digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
        vocabulary = tokenizer.get_vocab()
        spaced = {word: token for word, token in vocabulary.items() if word.startswith("Ġ") and word[1:].isalpha()}
        self.words = [(token, vocabulary.get(word[1:], token)) for word, token in sorted(spaced.items())]
        """A word after a space, and the same one without it where that is one token."""
        self.newline = tokenizer.convert_tokens_to_ids("Ċ")


def _batch(pieces: _Pieces, rng: random.Random) -> tuple[Tensor, Tensor]:
    """[batch, length] and the [batch, length - 1] tokens to say."""
    rows = [(_said_twice if rng.random() < 0.4 else _looked_up)(pieces, rng) for _ in range(BATCH)]
    longest = max(len(shown) + len(said) for shown, said in rows)
    tokens, labels = [], []
    for shown, said in rows:
        pad = longest - len(shown) - len(said)
        tokens.append(shown + said + [pieces.newline] * pad)
        labels.append([IGNORE] * len(shown) + said + [IGNORE] * pad)
    return torch.tensor(tokens), torch.tensor(labels)[:, 1:]


def _said_twice(pieces: _Pieces, rng: random.Random) -> tuple[list[int], list[int]]:
    picked = [
        (rng.choice(pieces.digits),) * 2 if rng.random() < 0.4 else rng.choice(pieces.words)
        for _ in range(rng.randint(6, 20))
    ]
    return [shown for shown, _ in picked] + [pieces.newline], [said for _, said in picked]


def _looked_up(pieces: _Pieces, rng: random.Random) -> tuple[list[int], list[int]]:
    entries = [
        [rng.choice(pieces.words)[0], *rng.choices(pieces.digits, k=rng.randint(1, 3))]
        for _ in range(rng.randint(2, 7))
    ]
    shown = [token for entry in entries for token in entry]
    rng.shuffle(entries)
    return [*shown, pieces.newline], [token for entry in entries for token in entry]
