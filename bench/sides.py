"""The servers that `bench/serving.py` and `bench/swap.py` compare, each a process of its own.

A side starts, answers jobs of load, changes between the base model and the adapter, is paused while another one is
measured, and ends with all its processes. All sides of vLLM get the same batch, context and cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nightschool import AsyncClient

from bench import tree
from bench.load import Job, Trace, messages, run_streams, trace_of
from bench.process import ANSWER_S, START_S, Process

if TYPE_CHECKING:
    import aiohttp

MERGE_S = 60.0
MAX_STREAMS = 32
BATCH_TOKENS = 512
CACHE_BYTES = 512 * 2**20
CONTEXT = 1024
RANK = 64
ADAPTER = "first"


@dataclass(frozen=True)
class Setting:
    """What all sides serve."""

    model: str
    adapter: Path
    dtype: str
    with_log: bool
    pin: bool
    """Whether vLLM's EngineCore is pinned to its worker's core."""


class Side(Protocol):
    """One server."""

    startup_s: float
    has_adapter: bool
    """Whether it can be asked for the adapter."""

    @property
    def pid(self) -> int: ...

    async def start(self) -> None: ...

    async def take(self, adapter: bool) -> None:
        """From now on the adapter answers, or the base model."""

    async def run(self, job: Job) -> list[Trace]: ...

    async def close(self) -> None: ...


class Nightschool:
    """`nightschool serve`, asked with the SDK's AsyncClient."""

    has_adapter = True

    def __init__(self, setting: Setting, engine: Literal["vllm", "transformers"], *settings: str) -> None:
        self.startup_s = 0.0
        self.name = ""
        """Of the adapter, as the registry named it."""
        self.with_log = setting.with_log
        self._setting, self._engine, self._settings = setting, engine, settings
        self._folder = tempfile.TemporaryDirectory(prefix="nightschool-bench-")
        self.process: Process
        self.client: AsyncClient

    @property
    def pid(self) -> int:
        return self.process.pid

    async def start(self) -> None:
        home = Path(self._folder.name)
        settings = [f"engine.dtype={self._setting.dtype}", f"engine.context_length={CONTEXT}", "server.drain_s=2"]
        settings += [f"engine.num_slots={MAX_STREAMS}", f"engine.prefill_chunk_tokens={BATCH_TOKENS}"]
        settings += [f"engine.max_lora_rank={RANK}", f"engine.cache_bytes={CACHE_BYTES}"]
        settings += [f"engine.pin_cores={str(self._setting.pin).lower()}", *self._settings]
        command = [sys.executable, "-m", "nightschool_server", "serve", "--home", str(home), "--port", "0"]
        command += ["--model", self._setting.model, "--engine", self._engine, "--no-learner"]
        self.process = Process(command + [word for one in settings for word in ("--set", one)])
        self.startup_s = await self.process.line("serving ")
        self.client = AsyncClient(home=home, timeout_s=ANSWER_S)
        self.name = (await self.client.admin.adapters.import_(str(self._setting.adapter))).name

    async def take(self, adapter: bool) -> None:
        seen, wanted = len(self.process.lines), self.name if adapter else "base"
        if (await self.client.admin.status()).active_adapter == wanted:
            return
        adapters = self.client.admin.adapters
        await (adapters.promote(wanted, force=True) if adapter else adapters.rollback(wanted))
        await self.process.line(f"event=adapter_merged name={wanted}", seen, MERGE_S)

    async def run(self, job: Job) -> list[Trace]:
        learning = "train" if self.with_log else "no_log"

        async def pieces(text: str) -> AsyncIterator[tuple[str, int | None, int | None]]:
            stream = self.client.stream(
                messages(text), max_tokens=job.tokens, temperature=0.0, ignore_eos=True, learning=learning
            )
            async for piece in stream:
                yield piece, None, None
            usage = stream.reply.usage
            yield "", usage.completion_tokens, usage.prompt_tokens

        return await run_streams(job, lambda _, text: trace_of(pieces(text)))

    async def close(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        if hasattr(self, "process"):
            await self.process.end()
        self._folder.cleanup()


class VLLMServe:
    """vLLM's OpenAI server over HTTP, asked with aiohttp; the request names the adapter."""

    has_adapter = True

    def __init__(self, setting: Setting) -> None:
        self.startup_s = 0.0
        self._setting = setting
        self._model = "base"
        self._stub = tempfile.TemporaryDirectory(prefix="vllm-stub-")
        self._process: Process
        self._http: aiohttp.ClientSession

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        import aiohttp  # it comes with vLLM

        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--model", self._setting.model, "--served-model-name", "base"]
        command += ["--enable-lora", "--lora-modules", f"{ADAPTER}={self._setting.adapter}"]
        command += ["--disable-uvicorn-access-log", *flags(vllm_arguments(self._setting.dtype))]
        path = f"{stub_distribution(Path(self._stub.name))}:{os.environ.get('PYTHONPATH', '')}"
        self._process = Process(command, env={"PYTHONPATH": path})
        self._http = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}",
            # The server closes idle connections after 5 s, also those that it slept over: drop them before it does.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
        )
        ends = time.perf_counter() + START_S
        while not await self._is_healthy():
            self._process.check("health", ends)
            await asyncio.sleep(0.1)
        self.startup_s = time.perf_counter() - self._process.began
        if self._setting.pin:
            tree.pin_engine_core(self.pid)

    async def take(self, adapter: bool) -> None:
        self._model = ADAPTER if adapter else "base"

    async def run(self, job: Job) -> list[Trace]:
        return await run_streams(job, lambda _, text: trace_of(self._pieces(text, job.tokens)))

    async def close(self) -> None:
        if hasattr(self, "_http"):
            await self._http.close()
        if hasattr(self, "_process"):
            await self._process.end()
        self._stub.cleanup()

    async def _pieces(self, text: str, tokens: int) -> AsyncIterator[tuple[str, int | None, int | None]]:
        body = {"model": self._model, "messages": messages(text), "max_tokens": tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.post("/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or {}
                choice = event["choices"][0] if event["choices"] else {"delta": {}}
                text_ = choice["delta"].get("content") or ""
                yield text_, usage.get("completion_tokens"), usage.get("prompt_tokens")

    async def _is_healthy(self) -> bool:
        import aiohttp

        try:
            async with self._http.get("/health") as response:
                return bool(response.status == 200)
        except aiohttp.ClientError:
            return False


class Raw:
    """`AsyncLLM` in a child that drives it itself; see `bench/raw.py`."""

    has_adapter = True

    def __init__(self, setting: Setting) -> None:
        self.startup_s = 0.0
        self._setting = setting
        self._adapter = False
        self._process: Process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        arguments = {**vllm_arguments(self._setting.dtype), "enable_lora": True, "disable_log_stats": True}
        command = [sys.executable, "-m", "bench.raw", self._setting.model, str(self._setting.adapter)]
        self._process = Process([*command, json.dumps(arguments)], stdin=True)
        await self._process.exchange(None)
        self.startup_s = time.perf_counter() - self._process.began
        if self._setting.pin:
            tree.pin_engine_core(self.pid)

    async def take(self, adapter: bool) -> None:
        self._adapter = adapter

    async def run(self, job: Job) -> list[Trace]:
        found = await self._process.exchange(json.dumps({**asdict(job), "with_adapter": self._adapter}))
        return [Trace(**{**trace, "arrivals": tuple(trace["arrivals"])}) for trace in found]

    async def close(self) -> None:
        if hasattr(self, "_process"):
            await self._process.end()


def vllm_arguments(dtype: str) -> dict[str, Any]:
    """Arguments that nightschool's engine gives vLLM too, for the sides without it."""
    return {
        "dtype": dtype,
        "max_model_len": CONTEXT,
        "max_num_seqs": MAX_STREAMS,
        "max_num_batched_tokens": BATCH_TOKENS,
        "max_lora_rank": RANK,
        "kv_cache_memory_bytes": CACHE_BYTES,
    }


def flags(arguments: dict[str, Any]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def stub_distribution(folder: Path) -> Path:
    """Metadata of a distribution called vllm, which the CPU build lacks and vLLM's server looks for."""
    try:
        version("vllm")
    except PackageNotFoundError:
        here = folder / "vllm-0.32.0+cpu.dist-info"
        here.mkdir()
        (here / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
