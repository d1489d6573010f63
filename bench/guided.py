"""What a strict tool costs: milliseconds per token, and to compile a set of tools, on TransformersEngine.

    python bench/guided.py [--quick] [--rounds 9] [--tokens 96]

Every answer is one long call of a strict tool, guided from its first token to its last, beside the same prompt with
the tool not strict and the same number of tokens. The shop's model in float32, one torch thread, greedy. Alternating
rounds; medians, the least and the most; ratios within a round. The last line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages, and `bench` must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import replace

from nightschool_server.chat import ToolSpec, canonical_json, user
from nightschool_server.engine import GenerateRequest, Prompt, Sampling
from nightschool_server.engines.guidance import strict_fault
from nightschool_server.engines.matching import Guide
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig

from examples.shop.toolbox import TOOLS

MODEL = Path(__file__).resolve().parents[1] / "examples" / "shop" / "model"
STREAMS = (1, 8)
ORDER = ToolSpec(
    "order",
    "Orders.",
    canonical_json(
        {
            "type": "object",
            "properties": {
                "lines": {
                    "type": "array",
                    "minItems": 64,
                    "items": {
                        "type": "object",
                        "properties": {
                            "colour": {"enum": ["red", "green", "blue"]},
                            "count": {"type": "integer", "minimum": 1, "maximum": 500},
                            "item": {"type": "string", "minLength": 3, "maxLength": 12},
                        },
                        "required": ["colour", "count", "item"],
                    },
                }
            },
            "required": ["lines"],
        }
    ),
    strict=True,
)


async def ms_per_token(engine: TransformersEngine, num_streams: int, num_tokens: int, *, guided: bool) -> float:
    """Wall time of one token of each stream, prefill left out."""
    tools = (ORDER,) if guided else (replace(ORDER, strict=False),)
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    first: list[float] = []

    async def run(index: int) -> None:
        prompt = Prompt((user(f"Order {index}"),), tools, tool_choice="required" if guided else "auto")
        seen, num_seen = False, 0
        async for delta in engine.generate(GenerateRequest(f"r{index}", prompt, sampling)):
            num_seen += len(delta.token_ids)
            if not seen:
                seen = True
                first.append(time.perf_counter())
        assert num_seen == num_tokens

    await asyncio.gather(*(run(index) for index in range(num_streams)))
    return 1000 * (time.perf_counter() - max(first)) / (num_tokens - 1)


def compile_ms() -> float:
    """To compile the shop's five tools, all strict, for its tokenizer, which has been read already."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    guide = Guide(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    guide.compiled(Prompt((user("x"),), (ORDER,)))
    tools = tuple(replace(tool, strict=True) for tool in TOOLS)
    strict_fault.cache_clear()
    began = time.perf_counter()
    guide.compiled(Prompt((user("x"),), tools))
    return 1000 * (time.perf_counter() - began)


async def measure(num_rounds: int, num_tokens: int) -> dict[str, object]:
    engine = await TransformersEngine.start(TransformersEngineConfig(model=str(MODEL), num_threads=1))
    found: dict[str, list[float]] = {}
    try:
        for number in range(num_rounds + 1):
            for streams in STREAMS:
                for guided in (False, True) if number % 2 else (True, False):
                    took = await ms_per_token(engine, streams, num_tokens, guided=guided)
                    if number:
                        found.setdefault(f"{streams} {'guided' if guided else 'free'}", []).append(took)
    finally:
        await engine.close()
    for streams in STREAMS:
        pairs = zip(found[f"{streams} guided"], found[f"{streams} free"], strict=True)
        found[f"{streams} ratio"] = [guided / free for guided, free in pairs]
    found["compile"] = [compile_ms() for _ in range(num_rounds)]
    return {name: [round(f, 3) for f in (statistics.median(v), min(v), max(v))] for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    args = parser.parse_args()
    result = asyncio.run(measure(2 if args.quick else args.rounds, args.tokens))
    for name, (median, least, most) in sorted(result.items()):  # type: ignore[misc]
        print(f"{name:10} {median:8.3f} ({least:.3f}-{most:.3f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
