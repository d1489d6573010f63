"""How like two texts are: the cosine of sentence embeddings, for GTA's free-text answers.

The public evaluator takes `all-mpnet-base-v2`; any encoder that transformers loads from a folder will do, and its
numbers are then its own. As in that model: the mean of the last layer's states over the tokens, at most 384 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nightschool_learner.errors import BenchmarkError

MAX_TOKENS = 384


class Embedder:
    """An encoder and its tokenizer from a folder, on the processor."""

    def __init__(self, folder: Path) -> None:
        """Raises BenchmarkError for a folder that holds no encoder."""
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise BenchmarkError(f"--embedder {folder} has no config.json: give the folder of an encoder")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise BenchmarkError(f"--embedder {folder} is no encoder that transformers can load: {error}") from error

    def similarity(self, text: str, references: Sequence[str]) -> float:
        """Of the likest reference: its cosine, 0 where that is negative."""
        import torch

        batch = self._tokenizer(
            [text, *references], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state  # [1 + num_references, length, width]
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return max(0.0, float((means[1:] @ means[0]).max()))
