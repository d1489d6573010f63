"""Between our requests and vLLM's: how tokens are chosen, and what was chosen.

Owns the end of an answer's text. vLLM leaves the bytes of an unfinished character out of it; here it is one replacement
mark, as in the tokenizer's own decode, so that tokens and text agree.
"""

from __future__ import annotations

from typing import Any

from nightschool_server.engine import Delta, FinishReason, Sampling, TopLogprob
from nightschool_server.engines.on_vllm.core import MAX_LOGPROBS
from nightschool_server.errors import InvalidRequestError

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}
_REPLACEMENT = "\ufffd"


def sampling_params(sampling: Sampling, grammar: str | None = None) -> Any:
    """vLLM's `SamplingParams`, the answers held to a grammar where there is one.

    Raises InvalidRequestError beyond what the engine was started for.
    """
    # Not before `core.py` has set what vLLM reads from the environment at its import.
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    if sampling.top_logprobs > MAX_LOGPROBS:
        raise InvalidRequestError(
            "top_logprobs",
            f"top_logprobs is {sampling.top_logprobs}; at most {MAX_LOGPROBS} are reported: ask for fewer",
        )
    try:
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            max_tokens=sampling.max_tokens,
            logprobs=sampling.top_logprobs if sampling.logprobs or sampling.top_logprobs else None,
            ignore_eos=sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
            skip_special_tokens=not sampling.special_tokens,
            structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar),
        )
    except VLLMValidationError as error:
        raise InvalidRequestError(error.parameter or "sampling", f"vLLM refuses the sampling: {error}") from error


class Answers:
    """The answers of one request, as they come."""

    def __init__(self, tokenizer: Any, sampling: Sampling, num_prompt_tokens: int) -> None:
        self._tokenizer, self._sampling, self._num_prompt = tokenizer, sampling, num_prompt_tokens
        self._said: dict[int, tuple[list[int], list[str]]] = {}

    def delta(self, completion: Any, num_cached_tokens: int) -> Delta:
        """What vLLM's newest completion adds to its answer."""
        logprobs: tuple[float, ...] = ()
        tops: tuple[tuple[TopLogprob, ...], ...] = ()
        if completion.logprobs is not None:
            by_token = list(zip(completion.logprobs, completion.token_ids, strict=True))
            if self._sampling.logprobs:
                logprobs = tuple(float(entry[token].logprob) for entry, token in by_token)
            if self._sampling.top_logprobs:
                tops = tuple(self._top(entry) for entry, _ in by_token)
        return Delta(
            index=completion.index,
            text=self._text(completion),
            token_ids=tuple(completion.token_ids),
            logprobs=logprobs,
            top_logprobs=tops,
            finish_reason=_FINISH.get(completion.finish_reason, "cancelled") if completion.finish_reason else None,
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=num_cached_tokens,
        )

    def _top(self, entry: Any) -> tuple[TopLogprob, ...]:
        ranked = sorted(entry.items(), key=lambda item: item[1].rank)[: self._sampling.top_logprobs]
        # What a grammar bans is minus infinity.
        kept = [(token, float(p.logprob)) for token, p in ranked if p.logprob > float("-inf")]
        return tuple(TopLogprob(token, self._tokenizer.decode([token]), logprob) for token, logprob in kept)

    def _text(self, completion: Any) -> str:
        """The completion's new text; at its end with what vLLM left out."""
        tokens, pieces = self._said.setdefault(completion.index, ([], []))
        tokens.extend(completion.token_ids)
        pieces.append(completion.text)
        text = str(completion.text)
        if completion.finish_reason is None or not tokens or isinstance(completion.stop_reason, str):
            return text
        if not self._decode(tokens[-1:]).endswith(_REPLACEMENT):
            return text
        whole, said = self._decode(tokens), "".join(pieces)
        return text + (whole[len(said) :] if whole.startswith(said) else "")

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not self._sampling.special_tokens))
