"""Single answers in place of pairs, for SFT and KTO: the pairs' own, and what callers said.

SFT learns every chosen answer and every correction. KTO learns which answers are good (chosen ones, corrections, thumbs
up) and which are not (rejected ones, thumbs down). Owns their order and TRL's two forms of batches; tokens and padding
are `trainer_data.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nightschool_learner.trainer_data import ANCHORS, EncodedAnchor, EncodedPair, PairCollator


@dataclass(frozen=True)
class Answer:
    """A prompt with one answer to it."""

    encoded: EncodedAnchor
    is_good: bool
    pair: int | None
    """The index of the pair that it is one side of; None for what a caller said."""


def answers_of(
    pairs: Sequence[EncodedPair], told: Sequence[tuple[EncodedAnchor, bool]], method: Literal["sft", "kto"], seed: int
) -> tuple[Answer, ...]:
    """The answers to learn from, in an order drawn from `seed`; SFT learns from good ones alone.

    The order is final: KTO measures the distance to the reference on each batch's own answers, so that its batches are
    fixed.
    """
    found = [Answer(encoded, is_good, None) for encoded, is_good in told]
    for index, pair in enumerate(pairs):
        for ids, is_good in ((pair.chosen_ids, True), (pair.rejected_ids, False)):
            found.append(Answer(EncodedAnchor(pair.prompt, pair.prompt_ids, ids, pair.is_image), is_good, index))
    kept = [answer for answer in found if answer.is_good or method == "kto"]
    random.Random(seed).shuffle(kept)
    return tuple(kept)


@dataclass(frozen=True)
class AnswerCollator:
    """Makes TRL's batches of answers; under ANCHORS stands a batch of the anchors that go with them."""

    answers: Sequence[Answer]
    pairs: PairCollator
    """Pads, and holds the anchors."""
    method: Literal["sft", "kto"]

    def dataset_rows(self, answers: Sequence[int], anchors: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of a dataset of some answers: their indices, and the anchors dealt to them in turn."""
        dealt = [list(anchors[i :: len(answers)]) for i in range(len(answers))]
        return {"row": list(answers), ANCHORS: dealt, "label": [self.answers[i].is_good for i in answers]}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of rows of the dataset: ids and masks [num_answers, length], images flat."""
        answers = [self.answers[row["row"]] for row in rows]
        sequences = [(answer.encoded, answer.encoded.answer_ids) for answer in answers]
        batch: dict[str, Any] = self.pairs.pad_sequences(sequences)
        if self.method == "sft":
            batch["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        else:
            batch["label"] = torch.tensor([answer.is_good for answer in answers])
            turned = [ids for _, ids in sequences[-1:] + sequences[:-1]]
            other = self.pairs.pad_sequences([(row, ids) for (row, _), ids in zip(sequences, turned, strict=True)])
            of_text = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
            batch |= {f"KL_{name}": other[name] for name in of_text if name in other}
        if anchors := [self.pairs.anchors[i] for row in rows for i in row.get(ANCHORS, ())]:
            batch[ANCHORS] = self.pairs.pad_sequences([(anchor, anchor.answer_ids) for anchor in anchors])
        return batch
