"""Streams of requests and what they waited: the load of the serving benchmarks, the same for every side.

A side gives one stream's requests as `Trace`s; this module makes the prompts, runs the streams beside each other and
sums up. Times are `time.perf_counter()` of the process that asked.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, pairwise
from typing import Any

SYSTEM = "You help a shopkeeper. Use the tools."


@dataclass(frozen=True)
class Job:
    """One block of load."""

    key: str
    """Makes its prompts its own, so that no block reads another's prefixes."""
    streams: int
    tokens: int
    requests: int
    """Of each stream, one after another."""


@dataclass(frozen=True)
class Trace:
    """One request."""

    began: float
    arrivals: tuple[float, ...]
    """Of every piece of text."""
    ended: float
    num_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True)
class Numbers:
    """One block of load on one side."""

    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    tpot_ms: float
    """Of the tokens after the first, median over the requests."""
    itl_p50_ms: float
    """Between two pieces of text; a side that sends two tokens as one piece has fewer."""
    itl_p99_ms: float
    e2e_p50_ms: float
    tokens_per_piece: float
    prompt_tokens: float
    server_cpu_s_per_1k: float = 0.0
    """CPU seconds of the server's processes per 1,000 tokens."""
    client_cpu_s_per_1k: float = 0.0
    others_cores: float = 0.0
    """Cores that neither the server nor this client used, but were used."""
    peak_rss_mb: float = 0.0
    """Of the server's processes together, shared pages counted in each."""


Ask = Callable[[int, str], Awaitable[Trace]]
"""Stream's number and the user's turn -> the request's trace."""


def messages(text: str) -> list[dict[str, str]]:
    """The conversation, as every side gets it."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def task(key: str, stream: int, request: int) -> str:
    """A turn of its own; its length in tokens is alike for all."""
    return f"Task {key}-{stream:03d}-{request:03d}: how many red apples are there in the shop, and what do they cost?"


async def run_streams(job: Job, ask: Ask) -> list[Trace]:
    """All streams at once, each with its requests one after another."""

    async def stream(number: int) -> list[Trace]:
        return [await ask(number, task(job.key, number, request)) for request in range(job.requests)]

    return list(chain.from_iterable(await asyncio.gather(*(stream(number) for number in range(job.streams)))))


async def trace_of(pieces: Any, begun: float | None = None) -> Trace:
    """Follow an async iterator of (text, completion tokens or None, prompt tokens or None) to its end."""
    began = time.perf_counter() if begun is None else begun
    arrivals, num_tokens, num_prompt = [], 0, 0
    async for text, completion, prompt in pieces:
        if text:
            arrivals.append(time.perf_counter())
        num_tokens, num_prompt = completion or num_tokens, prompt or num_prompt
    return Trace(began, tuple(arrivals), time.perf_counter(), num_tokens, num_prompt)


def summary(traces: Sequence[Trace]) -> Numbers:
    """Raises AssertionError where a request brought no text."""
    assert all(trace.arrivals for trace in traces), "a request brought no text"
    seconds = max(trace.ended for trace in traces) - min(trace.began for trace in traces)
    num_tokens = sum(trace.num_tokens for trace in traces)
    gaps = gaps_ms(traces)
    tpot = [1000 * (t.arrivals[-1] - t.arrivals[0]) / max(1, t.num_tokens - 1) for t in traces]
    return Numbers(
        requests_per_s=len(traces) / seconds,
        tokens_per_s=num_tokens / seconds,
        ttft_p50_ms=1000 * statistics.median(t.arrivals[0] - t.began for t in traces),
        tpot_ms=statistics.median(tpot),
        itl_p50_ms=quantile(gaps, 0.5),
        itl_p99_ms=quantile(gaps, 0.99),
        e2e_p50_ms=1000 * statistics.median(t.ended - t.began for t in traces),
        tokens_per_piece=num_tokens / sum(len(t.arrivals) for t in traces),
        prompt_tokens=statistics.mean(t.num_prompt_tokens for t in traces),
    )


def gaps_ms(traces: Iterable[Trace]) -> list[float]:
    """Between two pieces of text of one request, all requests together."""
    return [1000 * (later - earlier) for trace in traces for earlier, later in pairwise(trace.arrivals)]


def quantile(values: Iterable[float], q: float) -> float:
    """The value at rank q, 0 where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def spreads(runs: Sequence[Numbers]) -> dict[str, list[float]]:
    """[median, smallest, largest] over the rounds, by metric."""
    columns = {field.name: [asdict(run)[field.name] for run in runs] for field in fields(Numbers)}
    return {name: spread(values) for name, values in columns.items()}


def spread(values: Sequence[float]) -> list[float]:
    """[median, smallest, largest], rounded."""
    return [_rounded(value) for value in (statistics.median(values), min(values), max(values))]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
