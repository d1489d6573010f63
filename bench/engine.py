"""Tokens per second and time to first token of TransformersEngine, beside one `generate` per request.

    python bench/engine.py [--model examples/shop/model] [--tokens 64] [--rounds 5] [--threads 1]

Sides: the engine on the base model, on one rank-64 adapter, on base and two adapters mixed in one batch;
and the slow reference, transformers' `generate` with peft, one request after another. Same prompts, same
output length (the end token is ignored), greedy, both sides loaded, repetitions alternate, one warm-up.
Prints a table (median, min-max over the rounds) and a last line of JSON. CPU seconds are this process's
own: tokens per CPU second, and their ratios to `generate`, hold on a machine that others use better than
tokens per second do.
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
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nightschool_server.chat import system, template_messages, user
from nightschool_server.engine import BASE, GenerateRequest, Prompt, Sampling
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

STREAMS = (1, 8, 32)
SIDES: dict[str, tuple[str, ...]] = {
    "base": (BASE,),
    "one adapter": ("first",),
    "base + 2 adapters": (BASE, "first", "second"),
}


@dataclass(frozen=True)
class Run:
    """One measured repetition."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    first_token_ms: float
    """Median over the streams."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="examples/shop/model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as home:
        adapters = {
            name: make_adapter(arguments.model, Path(home) / name, seed)
            for seed, name in enumerate(("first", "second"))
        }
        runs = asyncio.run(measure(arguments, adapters))
    report(arguments, runs)


async def measure(arguments: argparse.Namespace, adapters: dict[str, Path]) -> dict[tuple[str, int], list[Run]]:
    """Runs by (side, streams), repetitions of all sides alternating."""
    config = TransformersEngineConfig(model=arguments.model, num_threads=arguments.threads)
    engine = await TransformersEngine.start(config)
    for name, folder in adapters.items():
        await engine.load_adapter(name, folder)
    reference = Slow(arguments.model, adapters)
    runs: dict[tuple[str, int], list[Run]] = {}
    for round_ in range(arguments.rounds + 1):
        for side, names in SIDES.items():
            for streams in STREAMS:
                run = await timed(streams, arguments.tokens, partial(fast, engine, names, arguments.tokens))
                runs.setdefault((side, streams), []).append(run)
        for side, name in (("generate, base", BASE), ("generate, one adapter", "first")):
            run = await timed(2, arguments.tokens, partial(reference.answer, name, arguments.tokens))
            runs.setdefault((side, 1), []).append(run)
        print(f"round {round_} of {arguments.rounds}", flush=True)
    await engine.close()
    return {key: found[1:] for key, found in runs.items()}


async def timed(streams: int, tokens: int, ask: Callable[[int], Awaitable[float]]) -> Run:
    """All streams at once; `ask` returns the seconds to its first token."""
    began, cpu_began = time.perf_counter(), time.process_time()
    first = await asyncio.gather(*(ask(i) for i in range(streams)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return Run(streams * tokens / seconds, streams * tokens / cpu, 1000 * statistics.median(first))


def prompt(i: int) -> Prompt:
    """A prompt of its own for stream i; the system part is common, as in real traffic."""
    task = f"Task {i}: how many red apples are there in the shop, and what do {i + 3} of them cost?"
    return Prompt((system("You help a shopkeeper. Use the tools."), user(task)))


async def fast(engine: TransformersEngine, adapters: tuple[str, ...], tokens: int, i: int) -> float:
    """Stream i through the engine, on the adapters in turn."""
    began, first, count = time.perf_counter(), 0.0, 0
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for delta in engine.generate(GenerateRequest(str(i), prompt(i), sampling, adapters[i % len(adapters)])):
        first = first or time.perf_counter() - began
        count += len(delta.token_ids)
    assert count == tokens
    return first


class Slow:
    """transformers' generate with peft, one request after another."""

    def __init__(self, folder: str, adapters: dict[str, Path]) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = load(folder)
        for name, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
        self._model = model.eval()

    async def answer(self, adapter: str, tokens: int, i: int) -> float:
        """One request; the loop has nothing else to do. There is no streaming: the first token is the whole."""
        began = time.perf_counter()
        text = self._tokenizer.apply_chat_template(
            template_messages(prompt(i).messages), add_generation_prompt=True, tokenize=False
        )
        inputs = self._tokenizer([text], return_tensors="pt", add_special_tokens=False)
        self._model.set_adapter(adapter if adapter != BASE else "first")
        with torch.inference_mode():
            if adapter == BASE:
                with self._model.disable_adapter():
                    self._generate(inputs, tokens)
            else:
                self._generate(inputs, tokens)
        return time.perf_counter() - began

    def _generate(self, inputs: Any, tokens: int) -> None:
        out = self._model.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)
        assert out.shape[1] == inputs["input_ids"].shape[1] + tokens


def load(folder: str) -> Any:
    """The plain model."""
    vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder)


def make_adapter(model: str, folder: Path, seed: int) -> Path:
    """A rank-64 adapter with random weights on every Linear of the text layers."""
    torch.manual_seed(seed)
    targets = r".*(text_model|language_model|model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config = LoraConfig(r=64, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    get_peft_model(load(model), config).save_pretrained(folder)
    return folder


def report(arguments: argparse.Namespace, runs: dict[tuple[str, int], list[Run]]) -> None:
    """The table, then one line of JSON."""
    print(
        f"\n{arguments.model}, {arguments.tokens} tokens, n={arguments.rounds}, threads={arguments.threads}, ", end=""
    )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| side | streams | tok/s | tok/s min-max | tok per CPU s | first token ms | times generate |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for (side, streams), found in runs.items():
        slow = "generate, base" if side.endswith("base") else "generate, one adapter"
        pairs = zip(found, runs[slow, 1], strict=True)
        ratios = sorted(one.tokens_per_cpu_s / other.tokens_per_cpu_s for one, other in pairs)
        speeds = sorted(run.tokens_per_s for run in found)
        speed, low, high = statistics.median(speeds), speeds[0], speeds[-1]
        ratio, less, more = statistics.median(ratios), ratios[0], ratios[-1]
        per_cpu = statistics.median(run.tokens_per_cpu_s for run in found)
        first = statistics.median(run.first_token_ms for run in found)
        rows.append(
            {
                "side": side,
                "streams": streams,
                "tokens_per_s": round(speed),
                "tokens_per_s_min_max": [round(low), round(high)],
                "tokens_per_cpu_s": round(per_cpu),
                "first_token_ms": round(first, 1),
                "times_generate": round(ratio, 1),
                "times_generate_min_max": [round(less, 1), round(more, 1)],
            }
        )
        print(
            f"| {side} | {streams} | {speed:.0f} | {low:.0f}-{high:.0f} | {per_cpu:.0f} | {first:.1f} "
            f"| {ratio:.1f} ({less:.1f}-{more:.1f}) |"
        )
    print(json.dumps({"model": arguments.model, "tokens": arguments.tokens, "rounds": arguments.rounds, "runs": rows}))


if __name__ == "__main__":
    main()
