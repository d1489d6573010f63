"""The first stage of training: the text tower learns to copy, before it learns what for.

Most of what the assistant does is to take a name or a number from one place to another. Sequences that
are said twice, look-ups of numbers by words, and look-ups in places that hold two words at once, as an image
token does, teach that in minutes; from the lessons alone it takes far longer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 32
IGNORE = -100
LEARNED = 0.8
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
        hidden = model.model(inputs_embeds=_embed(model, tokens)).last_hidden_state[:, :-1][spoken]
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


def _embed(model: Any, tokens: Tensor) -> Tensor:
    """[batch, length, 2] to [batch, length, width]: two tokens in one place are their sum at the length of one."""
    embedded: Tensor = model.get_input_embeddings()(tokens)
    mixed = (tokens[..., 0] != tokens[..., 1]).unsqueeze(-1)
    return embedded.sum(2) * torch.where(mixed, 0.5**0.5, 0.5)


def _batch(pieces: _Pieces, rng: random.Random) -> tuple[Tensor, Tensor]:
    """[batch, length, 2], in most places the same token twice, and the [batch, length - 1] tokens to say."""
    kinds = rng.choices((_said_twice, _looked_up, _looked_up_in_mixtures), (0.35, 0.45, 0.2), k=BATCH)
    rows = [kind(pieces, rng) for kind in kinds]
    longest = max(len(shown) + len(said) for shown, said in rows)
    tokens, labels = [], []
    for shown, said in rows:
        pad = longest - len(shown) - len(said)
        whole = [*shown, *((token, token) for token in said + [pieces.newline] * pad)]
        tokens.append(whole)
        labels.append([IGNORE] * len(shown) + said + [IGNORE] * pad)
    return torch.tensor(tokens), torch.tensor(labels)[:, 1:]


Row = tuple[list[tuple[int, int]], list[int]]
"""The places shown, two tokens each, and the tokens to say after them."""


def _said_twice(pieces: _Pieces, rng: random.Random) -> Row:
    picked = [
        (rng.choice(pieces.digits),) * 2 if rng.random() < 0.4 else rng.choice(pieces.words)
        for _ in range(rng.randint(6, 20))
    ]
    shown = [shown for shown, _ in picked] + [pieces.newline]
    return [(token, token) for token in shown], [said for _, said in picked]


def _looked_up_in_mixtures(pieces: _Pieces, rng: random.Random) -> Row:
    """Two to four places that hold a word and another; then the words of each, in another order."""
    words = [token for token, _ in rng.sample(pieces.words, 8)]
    entries = list(zip(words[:4], words[4:], strict=True))[: rng.randint(2, 4)]
    said = rng.sample(entries, len(entries))
    return [*entries, (pieces.newline, pieces.newline)], [token for entry in said for token in entry]


def _looked_up(pieces: _Pieces, rng: random.Random) -> Row:
    entries = [
        [rng.choice(pieces.words)[0], *rng.choices(pieces.digits, k=rng.randint(1, 3))]
        for _ in range(rng.randint(2, 7))
    ]
    shown = [(token, token) for entry in entries for token in entry]
    rng.shuffle(entries)
    return [*shown, (pieces.newline, pieces.newline)], [token for entry in entries for token in entry]
