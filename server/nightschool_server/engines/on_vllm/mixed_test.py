"""The proof at start that a batch of several adapters answers each row as it would alone.

The base model, two adapters of random numbers and one that was retired before run greedily, each alone and then all in
one batch. Where a row's tokens differ, they may do so only where two tokens are as likely as rounding allows.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
from nightschool_server.errors import ModelFormatError

MAX_DIFFERENCE_NATS = 0.05
"""How far logprobs of the same token may lie apart; bfloat16 rounds otherwise in another batch."""

_NUM_TOKENS = 6
_PROMPT = (3, 5, 7, 11, 13, 17, 19, 23)
_STD = 0.05
_FIRST_NUMBER = 1_000_000
"""Numbers of the test's adapters, which no adapter of a user ever gets."""


@dataclass(frozen=True)
class _Row:
    number: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


async def check_mixed_batches(core: Any, config: VLLMEngineConfig) -> None:
    """Raise ModelFormatError where a mixed batch is answered wrongly, or nothing is."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        await _check(core, config)
    except EngineDeadError as error:
        raise ModelFormatError(
            f"vLLM stopped at its first answer with model {config.model!r}: the lines above say why; another model, or "
            "--engine transformers, may do"
        ) from error


async def _check(core: Any, config: VLLMEngineConfig) -> None:
    rank = min(8, config.max_lora_rank)
    one, two, retired = range(_FIRST_NUMBER, _FIRST_NUMBER + 3)
    for number in (one, two, retired):
        await core.collective_rpc("nightschool_randomise", args=(number, rank, _STD))
    numbers = [1, one, two, retired] if config.max_loras >= 4 else [1, one]
    alone = [await _run(core, number, "alone") for number in numbers]
    together = await asyncio.gather(*(_run(core, number, "together") for number in numbers))
    for number in (one, two, retired):
        await core.collective_rpc("nightschool_forget", args=(number,))
    for left, right in zip(alone, together, strict=True):
        difference = _difference(left, right)
        if difference > MAX_DIFFERENCE_NATS:
            raise ModelFormatError(
                f"vLLM answers adapter {left.number} otherwise in a batch with others than alone ({difference:.2g} "
                "nats): this build mixes adapters up; use --engine transformers, or another version of vLLM"
            )
    if len({row.logprobs[0] for row in alone}) < len(alone):
        raise ModelFormatError(
            "vLLM answers different adapters alike: LoRA has no effect on this model; use --engine transformers"
        )


async def fingerprint(core: Any, number: int) -> list[float]:
    """The logprobs of an adapter's greedy answer to a fixed prompt, by which it is known again."""
    return list((await _run(core, number, "fingerprint")).logprobs)


def largest_difference(left: list[float], right: list[float]) -> float:
    """Between two fingerprints, nats."""
    return max(abs(x - y) for x, y in zip(left, right, strict=True))


async def _run(core: Any, number: int, salt: str) -> _Row:
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        max_tokens=_NUM_TOKENS,
        temperature=0.0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = {"type": "token", "prompt_token_ids": list(_PROMPT), "cache_salt": f"self-test {salt}"}
    lora = LoRARequest(lora_name=str(number), lora_int_id=number, lora_path="self-test")
    async for output in core.generate(prompt, params, f"self-test-{number}-{salt}", lora_request=lora):
        completion = output.outputs[0]
    logprobs = tuple(
        float(entry[token].logprob) for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
    )
    return _Row(number, tuple(completion.token_ids), logprobs)


def _difference(left: _Row, right: _Row) -> float:
    """The largest difference of logprobs up to and including the first position where the tokens differ, in nats."""
    largest = 0.0
    for a, b, x, y in zip(left.tokens, right.tokens, left.logprobs, right.logprobs, strict=True):
        largest = max(largest, abs(x - y))
        if a != b:
            break
    return largest
