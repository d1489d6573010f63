"""The limit of the serving benchmark: vLLM's `AsyncLLM` without a server, driven in its own process.

    python -m bench.raw MODEL ADAPTER ARGUMENTS

Started by `bench/serving.py` (side `raw`): one line of JSON in (a job), one out (the traces). Its client's work is its
own, so the CPU seconds of its processes are those of client and server together.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from bench.load import Job, Trace, messages, run_streams, trace_of

READY = "ready"


async def serve(model: str, adapter: str, arguments: dict[str, Any], out: Any) -> None:
    """Answer jobs from stdin until it ends."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **arguments))
    tokenizer = engine.get_tokenizer()
    lora = LoRARequest("first", 1, adapter)
    numbers = itertools.count()

    async def pieces(text: str, tokens: int, with_adapter: bool) -> AsyncIterator[tuple[str, int, int]]:
        prompt = tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        count = 0
        async for output in engine.generate(
            {"prompt_token_ids": ids}, params, str(next(numbers)), lora_request=lora if with_adapter else None
        ):
            count += len(output.outputs[0].token_ids)
            yield output.outputs[0].text, count, len(ids)

    def say(value: object) -> None:
        print(json.dumps(value), file=out, flush=True)

    say(READY)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = json.loads(line)
            with_adapter, work = job.pop("with_adapter"), Job(**job)

            async def ask(_: int, text: str, tokens: int = work.tokens, with_adapter: bool = with_adapter) -> Trace:
                return await trace_of(pieces(text, tokens, with_adapter), time.perf_counter())

            say([asdict(trace) for trace in await run_streams(work, ask)])
    finally:
        engine.shutdown()


def main() -> None:
    """vLLM writes to stdout: only answers go to the pipe."""
    model, adapter, arguments = sys.argv[1:4]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(serve(model, adapter, json.loads(arguments), out))


if __name__ == "__main__":
    main()
