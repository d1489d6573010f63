"""From sampled token ids to the text that a caller may see: incremental, whole characters, stop strings.

The texts of one answer's deltas, joined, are what the tokenizer decodes from all of its token ids
(special tokens skipped unless they are asked for), cut before the first stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], shown_without: frozenset[int] | None = None) -> None:
        """`shown_without`: show special tokens, but for these; None skips all of them."""
        self._tokenizer = tokenizer
        self._skips = shown_without is None
        self._hidden = shown_without or frozenset()
        self._stream: Any = DecodeStream(skip_special_tokens=self._skips)
        self._stop = tuple(s for s in stop if s)
        self._token_ids: list[int] = []
        self._num_decoded = 0
        """Characters that the decoder gave out."""
        self._held = ""
        """Decoded text that may be the beginning of a stop string."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is new and certain after `token_id`, and whether a stop string ended the answer."""
        if token_id in self._hidden:
            return "", False
        self._token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if not piece:
            return "", False
        self._num_decoded += len(piece)
        return self._release(piece)

    def finish(self) -> tuple[str, bool]:
        """What is left when the answer ends: held text, and bytes that never became a character (U+FFFD)."""
        rest = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skips)[self._num_decoded :]
        text, stopped = self._release(rest)
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _release(self, piece: str) -> tuple[str, bool]:
        if not self._stop:
            return piece, False
        text = self._held + piece
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, s) for s in self._stop)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
