"""What a swap of the active adapter costs those who are being answered: nothing may fail, nothing may be mixed.

    python bench/swap.py [--engine vllm|transformers] [--seconds 120] [--every 2] [--streams 16] [--tokens 48] [--quick]

One server process in float32 on a tiny model whose greedy paths are well apart, two adapters of rank 64. First every
prompt is answered by each adapter, single-stream, merged and not: those are the known answers. Then `--streams` clients
stream one request after another, half of the time in quiet, half while the active adapter is promoted and rolled back
by turns every `--every` seconds. A reply is `failed` where the call or its length is, `wrong` where it is another
adapter's answer than the one it names, `mixed` where it is neither adapter's.

`swap`: from the call of promote or rollback to the first token of a new request, sent when the call has returned, that
names the new adapter; it waits beside the other streams. `itl_p99_ratio`: the 99th percentile of the time between two
pieces of text, while swapping to quiet. Memory is the resident one of all the server's processes after each swap;
`memory_growth` is from swap 10 (from the first one where there are fewer than 20) to the end, as a share.
Prints a table and a last line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages, and `bench` must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from nightschool import NightschoolError
from nightschool.streams import AsyncStream

from bench import tree
from bench.load import Trace, gaps_ms, messages, quantile, spread, task
from bench.sides import Nightschool, Setting
from bench.tiny import make_adapter, make_model

NUM_PROMPTS = 4
SETTLED_SWAP = 10
PROBE_TOKENS = 2
WIDE = 0.12

Known = dict[tuple[str, int], set[str]]
"""Right answers by adapter and prompt; two where merged and unmerged weights round apart."""


@dataclass
class Tally:
    """What became of the clients' requests."""

    ok: int = 0
    failed: int = 0
    wrong: int = 0
    mixed: int = 0
    by_adapter: dict[str, int] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """The first failures and mixed replies."""

    def note(self, text: str) -> None:
        if len(self.notes) < 5:
            self.notes.append(text)


@dataclass(frozen=True)
class Swap:
    """One change of the active adapter."""

    call_s: float
    first_token_s: float
    rss_mb: float
    named: bool
    """Whether the new request named the new adapter."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--seconds", type=float, default=120.0, help="of swapping; the quiet stretch is as long")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two swaps")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="12 seconds and 4 streams")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.streams = 12.0, 4
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-swap-") as folder:
        model = make_model(Path(folder) / "model", dtype=torch.float32, std=WIDE)
        adapters = [make_adapter(model, Path(folder) / name, seed) for seed, name in enumerate(("first", "second"))]
        asyncio.run(measure(arguments, str(model), adapters))


async def measure(arguments: argparse.Namespace, model: str, folders: list[Path]) -> None:
    """Answers, quiet, swaps, report."""
    server = Nightschool(Setting(model, folders[0], "float32", False, True), arguments.engine)
    try:
        await server.start()
        names = [server.name, (await server.client.admin.adapters.import_(str(folders[1]))).name]
        print(f"started in {server.startup_s:.1f} s with adapters {', '.join(names)}", flush=True)
        known = await answers(server, names, arguments.tokens)
        # Buffers of the first full batches are not to count as growth.
        await stretch(server, known, arguments, min(5.0, arguments.seconds / 4), [])
        quiet, _ = await stretch(server, known, arguments, arguments.seconds, [])
        swapping, swaps = await stretch(server, known, arguments, arguments.seconds, names)
        report(arguments, quiet, swapping, swaps)
    finally:
        await server.close()


async def answers(server: Nightschool, names: list[str], tokens: int) -> Known:
    """Every adapter's answer to every prompt, alone; leaves the first adapter active."""
    known: Known = {}
    for active in reversed(names):
        seen = len(server.process.lines)
        await server.client.admin.adapters.promote(active, force=True)
        await server.process.line(f"event=adapter_merged name={active}", seen, 60.0)
        for name in names:
            for number in range(NUM_PROMPTS):
                stream = ask(server, number, tokens, adapter=name)
                known.setdefault((name, number), set()).add("".join([text async for text in stream]))
    for number in range(NUM_PROMPTS):
        assert not known[names[0], number] & known[names[1], number], "the adapters answer alike: nothing to tell"
    rounded = sum(len(found) > 1 for found in known.values())
    print(f"known answers: {len(known)}, of which {rounded} differ between merged and unmerged weights", flush=True)
    return known


def ask(server: Nightschool, number: int, tokens: int, adapter: str | None = None) -> AsyncStream:
    """One of the prompts, greedy."""
    return server.client.stream(
        messages(task("swap", number, 0)),
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        learning="no_log",
        adapter=adapter,
    )


async def stretch(
    server: Nightschool, known: Known, arguments: argparse.Namespace, seconds: float, names: list[str]
) -> tuple[Tally, list[Swap]]:
    """Streams for so long; the active adapter is swapped meanwhile where `names` are given."""
    tally, ends = Tally(), time.perf_counter() + seconds
    swaps: list[Swap] = []

    async def client(number: int) -> None:
        turn = number
        while time.perf_counter() < ends:
            await one_request(server, known, tally, turn % NUM_PROMPTS, arguments.tokens)
            turn += 1

    clients = [asyncio.create_task(client(number)) for number in range(arguments.streams)]
    try:
        while names and time.perf_counter() + arguments.every < ends:
            await asyncio.sleep(arguments.every)
            # Promote the second, roll back to the first, by turns.
            swaps.append(await one_swap(server, names[(len(swaps) + 1) % 2], forward=len(swaps) % 2 == 0))
        await asyncio.gather(*clients)
    finally:
        for task_ in clients:
            task_.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return tally, swaps


async def one_request(server: Nightschool, known: Known, tally: Tally, number: int, tokens: int) -> None:
    """Ask, time and judge."""
    began, arrivals, texts = time.perf_counter(), [], []
    stream = ask(server, number, tokens)
    try:
        async for text in stream:
            arrivals.append(time.perf_counter())
            texts.append(text)
        reply = stream.reply
    except NightschoolError as error:
        tally.failed += 1
        tally.note(f"failed: {error}")
        return
    num_tokens, answer = reply.usage.completion_tokens, "".join(texts)
    tally.traces.append(Trace(began, tuple(arrivals), time.perf_counter(), num_tokens, reply.usage.prompt_tokens))
    tally.by_adapter[reply.adapter] = tally.by_adapter.get(reply.adapter, 0) + 1
    named_at_start = stream.started.adapter if stream.started else ""
    if num_tokens != tokens or reply.answers[0].text != answer or named_at_start != reply.adapter:
        tally.failed += 1
        tally.note(f"failed: {num_tokens} tokens, started as {named_at_start}, ended as {reply.adapter}")
    elif answer in known.get((reply.adapter, number), ()):
        tally.ok += 1
    elif any(answer in found for (_, of), found in known.items() if of == number):
        tally.wrong += 1
        tally.note(f"wrong: {reply.adapter} named, another one answered prompt {number}")
    else:
        tally.mixed += 1
        right = max(known.get((reply.adapter, number), {""}))
        tally.note(f"mixed: {reply.adapter}, prompt {number}: {answer!r} instead of {right!r}")


async def one_swap(server: Nightschool, name: str, *, forward: bool) -> Swap:
    """Promote `name`, or roll back to what was before, and ask something new."""
    adapters = server.client.admin.adapters
    began = time.perf_counter()
    change = await (adapters.promote(name, force=True) if forward else adapters.rollback())
    call_s = time.perf_counter() - began
    assert change.active_adapter == name, f"{change.active_adapter} is active instead of {name}"
    stream, first = ask(server, 0, PROBE_TOKENS), 0.0
    with contextlib.suppress(NightschoolError):
        async for _ in stream:
            first = first or time.perf_counter() - began
    named = stream.started is not None and stream.started.adapter == name and first > 0
    return Swap(call_s, first, await asyncio.to_thread(tree.rss_mb, server.pid), named)


def report(arguments: argparse.Namespace, quiet: Tally, swapping: Tally, swaps: list[Swap]) -> None:
    """The table, then one line of JSON."""
    assert swaps, "no swap came: raise --seconds"
    print(f"\n{arguments.engine}, {arguments.streams} streams, {arguments.tokens} tokens, {len(swaps)} swaps, ", end="")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| stretch | replies | failed | wrong | mixed | first token p50, ms | ITL p50, ms | ITL p99, ms |")
    print("|---|---|---|---|---|---|---|---|")
    stretches: dict[str, dict[str, Any]] = {}
    for name, tally in (("quiet", quiet), ("swapping", swapping)):
        gaps = gaps_ms(tally.traces)
        ttft = quantile([1000 * (trace.arrivals[0] - trace.began) for trace in tally.traces if trace.arrivals], 0.5)
        p50, p99 = quantile(gaps, 0.5), quantile(gaps, 0.99)
        stretches[name] = {"replies": len(tally.traces), "ttft_p50_ms": ttft, "itl_p50_ms": p50, "itl_p99_ms": p99}
        stretches[name] |= {"itl_max_ms": max(gaps, default=0.0), "by_adapter": tally.by_adapter}
        counts = f"{len(tally.traces)} | {tally.failed} | {tally.wrong} | {tally.mixed}"
        print(f"| {name} | {counts} | {ttft:.1f} | {p50:.2f} | {p99:.2f} |")
    for note in [*quiet.notes, *swapping.notes]:
        print(note)
    settled = swaps[SETTLED_SWAP - 1 if len(swaps) >= 2 * SETTLED_SWAP else 0].rss_mb
    grown = swaps[-1].rss_mb - settled
    result = {
        "engine": arguments.engine,
        "failed": quiet.failed + swapping.failed + sum(not swap.named for swap in swaps),
        "wrong": quiet.wrong + swapping.wrong,
        "mixed": quiet.mixed + swapping.mixed,
        "swaps": len(swaps),
        "swap_p50_s": round(quantile([swap.first_token_s for swap in swaps], 0.5), 4),
        "swap_p99_s": round(quantile([swap.first_token_s for swap in swaps], 0.99), 4),
        "call_s": spread([swap.call_s for swap in swaps]),
        "itl_p99_ratio": round(stretches["swapping"]["itl_p99_ms"] / stretches["quiet"]["itl_p99_ms"], 3),
        "memory_growth": round(grown / settled, 4),
        "memory_growth_mb": round(grown, 1),
        "memory_mb": [round(swap.rss_mb, 1) for swap in swaps],
        "seconds": arguments.seconds,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "stretches": stretches,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
