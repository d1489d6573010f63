"""The end of an answer's text: a character that was cut off is one replacement mark, as in the tokenizer's own decode.

vLLM leaves the bytes of an unfinished character out of the text; tokens and text would then disagree.
"""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"


class Endings:
    """What is known of one request's answers, by index."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._answers: dict[int, tuple[list[int], list[str]]] = {}

    def text(self, completion: Any) -> str:
        """The completion's new text; at its end with what vLLM left out."""
        tokens, pieces = self._answers.setdefault(completion.index, ([], []))
        tokens.extend(completion.token_ids)
        pieces.append(completion.text)
        if completion.finish_reason is None or not tokens or isinstance(completion.stop_reason, str):
            return str(completion.text)
        if not self._decode(tokens[-1:]).endswith(_REPLACEMENT):
            return str(completion.text)
        whole, said = self._decode(tokens), "".join(pieces)
        return str(completion.text) + (whole[len(said) :] if whole.startswith(said) else "")

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
