"""Guided rows of a step: which tokens each may sample next.

Owns grammars compiled for one model's tokenizer, a matcher for every guided answer, and the mask over a step's logits.
A matcher ends as vLLM's does: with the tokenizer's end token, after which a row that goes on (`ignore_eos`) is free.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
import torch
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from nightschool_server.agent.toolcalls import CLOSE, OPEN
from nightschool_server.chat import ToolSpec
from nightschool_server.engine import Prompt, ToolChoice
from nightschool_server.engines.guidance import LIMITS, Marks, check_tools, grammar, reason
from nightschool_server.errors import InvalidRequestError

log = logging.getLogger(__name__)

_MAX_COMPILED = 128


@dataclass(frozen=True)
class Compiled:
    """A grammar, ready for answers."""

    grammar: str
    _beginning: llguidance.LLMatcher
    _end_id: int

    def matcher(self) -> Matcher:
        """The state of one more answer."""
        return Matcher(self._beginning.deep_copy(), self._end_id)


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher, end_id: int) -> None:
        self._inner, self._end_id = inner, end_id
        self.ended = False
        """Whether the end token came: nothing is held any more."""

    def accept(self, token_id: int) -> None:
        """Take in a sampled token."""
        self.ended = self.ended or token_id == self._end_id
        if not self._inner.is_stopped() and not self._inner.consume_token(token_id):
            log.warning("event=guide_failed reason=%r", reason(self._inner.get_error()))

    def fill(self, bits: NDArray[np.int32], row: int) -> None:
        """Set the bits of the tokens that may come next. Beyond the library's limits only the end token may."""
        fill_next_token_bitmask(self._inner, bits, row)


class Guide:
    """The grammars of one model. Threads may share it; the tokenizer is read at the first guided prompt."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._read: tuple[llguidance.LLTokenizer, Marks] | None = None
        self._compiled: OrderedDict[tuple[tuple[ToolSpec, ...], ToolChoice], Compiled] = OrderedDict()

    def compiled(self, prompt: Prompt) -> Compiled:
        """The grammar of a guided prompt's answers. Raises InvalidRequestError.

        A new set of tools takes milliseconds, the first one of a large vocabulary a second: not for the event loop.
        """
        check_tools(prompt)
        with self._lock:
            if self._read is None:
                self._read = self._read_tokenizer()
            tokenizer, marks = self._read
            key = (prompt.tools, prompt.tool_choice)
            if key not in self._compiled:
                text = grammar(prompt.tools, required=prompt.tool_choice == "required", marks=marks)
                self._compiled[key] = _compile(tokenizer, text)
                if len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _read_tokenizer(self) -> tuple[llguidance.LLTokenizer, Marks]:
        tokenizer = from_tokenizer(self._tokenizer, self._vocab_size)
        # llguidance takes added tokens for special ones, which no text matches; to the tokenizer they are text.
        added = {
            token_id: str(token)
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if not token.special and tokenizer.is_special_token(token_id)
        }
        by_text = {text: token_id for token_id, text in added.items()}
        marks = Marks(
            open_id=by_text.get(OPEN),
            close_id=by_text.get(CLOSE),
            text_ids=tuple(sorted(i for i, text in added.items() if text not in (OPEN, CLOSE))),
            end_ids=tuple(sorted(self._eos_ids - {tokenizer.eos_token})),
        )
        return tokenizer, marks


def hold(logits: torch.Tensor, matchers: Mapping[int, Matcher]) -> None:
    """Set the logits [num_rows, vocabulary] of what a guided row may not sample to minus infinity, in place."""
    bits = allocate_token_bitmask(len(matchers), logits.shape[1])
    for row, matcher in enumerate(matchers.values()):
        matcher.fill(bits, row)
    banned = np.unpackbits(np.invert(bits).view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    masks = torch.from_numpy(banned.view(np.bool_)).to(logits.device)
    for mask, row in zip(masks, matchers, strict=True):
        logits[row].masked_fill_(mask, float("-inf"))


def _compile(tokenizer: llguidance.LLTokenizer, text: str) -> Compiled:
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        message = f"the tools cannot be guided together ({reason(matcher.get_error())}): send fewer, or drop strict"
        raise InvalidRequestError("tools", message)
    return Compiled(text, matcher, tokenizer.eos_token)
