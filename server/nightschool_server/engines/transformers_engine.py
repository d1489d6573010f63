"""The engine on transformers: one model, many requests at once, each on its own adapter.

Owns the asynchronous face of the engine. A request is rendered on a small thread pool, run by the owner
thread (`loop.py`), and streamed back to the event loop that asked. See docs/engine.md for how a batch
runs and what it costs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nightschool_server.engine import (
    BASE,
    PRACTICE_PRIORITY,
    Delta,
    EngineStats,
    GenerateRequest,
    ModelInfo,
    Prompt,
    Sampling,
    Scores,
)
from nightschool_server.engines.checks import check_length, check_sampling
from nightschool_server.engines.delivery import Mailbox, merge_deltas
from nightschool_server.engines.guidance import is_guided
from nightschool_server.engines.loading import LoadedModel, load_model
from nightschool_server.engines.loop import EngineLoop
from nightschool_server.engines.lora import BASE_SERIAL
from nightschool_server.engines.lora_files import AdapterWeights, read_adapter
from nightschool_server.engines.matching import Guide
from nightschool_server.engines.merging import MergedLane
from nightschool_server.engines.rendering import Rendered
from nightschool_server.engines.runner import Runner
from nightschool_server.engines.scheduler import Limits, Scheduler
from nightschool_server.engines.selftest import switch_to_slots
from nightschool_server.engines.sequences import Job
from nightschool_server.engines.slots import SlotCache
from nightschool_server.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidRequestError,
    OverloadedError,
    UnknownAdapterError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransformersEngineConfig:
    """How a model is served by transformers."""

    model: str
    """A folder or a hub id."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on CUDA and float32 elsewhere."""
    num_slots: int = 32
    """Sequences that run at once."""
    num_retained_slots: int = 8
    """Further slots that only keep finished prefixes for reuse."""
    context_length: int = 0
    """Tokens of prompt and answer together; 0 is the model's own."""
    max_lora_rank: int = 64
    prefill_chunk_tokens: int = 512
    """Prompt tokens computed in one step."""
    max_practice_rows_with_live: int = 4
    """Tokens of practice, decoded or prefilled, in a step with a live request; four times as many between two."""
    live_linger_s: float = 0.5
    """A step is between two live requests until so long after the last one."""
    num_threads: int = 0
    """Of torch; 0 leaves one core to the event loop."""
    max_waiting: int = 1024
    """Sequences that may wait for a slot, live and practice counted apart; more are refused."""
    merged_lane: bool = True
    """Whether an adapter may be merged; costs one more copy of the weights that it changes."""


class TransformersEngine:
    """An `Engine` (see `nightschool_server.engine`) over a transformers model; make one with `start`."""

    def __init__(self, config: TransformersEngineConfig, loaded: LoadedModel, runner: Runner) -> None:
        self._config, self._loaded, self._runner = config, loaded, runner
        limits = Limits(
            config.num_slots,
            config.num_retained_slots,
            config.prefill_chunk_tokens,
            config.max_practice_rows_with_live,
            config.live_linger_s,
        )
        self._scheduler = Scheduler(limits, runner.cache.copy_prefix)
        self._loop = EngineLoop(
            runner, self._scheduler, loaded.tokenizer.backend_tokenizer, loaded.eos_ids, _num_threads(config)
        )
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nightschool-render")
        self._lane = MergedLane(self._loop, runner.adapters, self._pool)
        self._guide = Guide(loaded.tokenizer, loaded.vocab_size, loaded.eos_ids)
        self._serials: dict[str, int] = {BASE: BASE_SERIAL}
        self._loading: set[str] = set()
        self._last_serial = BASE_SERIAL
        self._arrivals = itertools.count()
        self._num_submitted = {True: 0, False: 0}
        # A stage of practice begins with many calls at once: of two threads, one is left to live requests.
        self._practice_rendering = asyncio.Semaphore(1)

    @classmethod
    async def start(cls, config: TransformersEngineConfig) -> TransformersEngine:
        """Load the model in a thread and prove that it runs on slots. Raises ModelFormatError."""
        return await asyncio.to_thread(cls.start_blocking, config)

    @classmethod
    def start_blocking(cls, config: TransformersEngineConfig) -> TransformersEngine:
        """`start` for callers without an event loop."""
        began = time.monotonic()
        loaded = load_model(config)
        total = config.num_slots + config.num_retained_slots
        runner = Runner(loaded.parts, SlotCache(max(2, total), loaded.info.context_length))
        switch_to_slots(loaded, runner)
        log.info("event=engine_started model=%s seconds=%.1f", config.model, time.monotonic() - began)
        return cls(config, loaded, runner)

    @property
    def kind(self) -> str:
        """The engine's name in the configuration."""
        return "transformers"

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        return self._loaded.info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Stream the answers of a request; see `Engine.generate`. Raises OverloadedError besides."""
        self._loop.check_alive()
        arrival = next(self._arrivals)
        serial = self._serial(request.adapter)
        check_sampling(request.sampling)
        guide = await asyncio.to_thread(self._guide.compiled, request.prompt) if is_guided(request.prompt) else None
        async with self._practice_rendering if request.priority >= PRACTICE_PRIORITY else nullcontext():
            rendered = await self._render(request.prompt)
        check_length(len(rendered.token_ids), request.sampling.max_tokens, self.model.context_length)
        mailbox = Mailbox(asyncio.get_running_loop())
        job = Job(
            request.request_id, rendered, request.sampling, serial, request.priority, mailbox, arrival, guide=guide
        )
        self._submit(job, request.adapter)
        unfinished = len(job.sequences)
        try:
            while unfinished:
                deltas = [item for item in await mailbox.get() if isinstance(item, Delta)]
                for delta in merge_deltas(deltas):
                    unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            if unfinished:
                self._loop.abort(job)

    async def score(self, prompt: Prompt, continuation: str, *, adapter: str = BASE, priority: int = 0) -> Scores:
        """Logprobs of a continuation; see `Engine.score`. Raises what `generate` raises."""
        self._loop.check_alive()
        arrival = next(self._arrivals)
        serial = self._serial(adapter)
        rendered = await self._render(prompt)
        following = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._loaded.renderer.tokenise, continuation
        )
        if not len(following):
            raise InvalidRequestError("continuation", "the continuation has no tokens: give text to score")
        check_length(len(rendered.token_ids), len(following), self.model.context_length)
        mailbox = Mailbox(asyncio.get_running_loop())
        job = Job("score", rendered, Sampling(), serial, priority, mailbox, arrival, np.array(following))
        self._submit(job, adapter)
        try:
            scores = (await mailbox.get())[0]
        except asyncio.CancelledError:
            self._loop.abort(job)
            raise
        assert isinstance(scores, Scores)
        return scores

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter servable; see `Engine.load_adapter`."""
        self._loop.check_alive()
        if name in self._serials or name in self._loading:
            raise AlreadyExistsError(f"adapter {name!r} is already loaded: names are never reused, give it a new one")
        self._loading.add(name)
        try:
            weights = await asyncio.get_running_loop().run_in_executor(self._pool, self._read_adapter, folder)
            self._last_serial += 1
            serial = self._last_serial
            await self._loop.call(lambda: self._runner.adapters.install(serial, weights))
            self._serials[name] = serial
        finally:
            self._loading.discard(name)
        log.info("event=adapter_loaded name=%s modules=%d", name, len(weights.modules))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; raises FailedPreconditionError where a request still holds it, or it is merged."""
        serial = self._serial(name)
        if serial == BASE_SERIAL:
            raise FailedPreconditionError("the base model cannot be unloaded: stop the server instead")

        def remove() -> None:
            if self._scheduler.uses_adapter(serial):
                raise FailedPreconditionError(f"adapter {name!r} is in use: wait until its requests have ended")
            if serial == self._lane.serial:
                raise FailedPreconditionError(f"adapter {name!r} is merged into the weights: merge another one first")
            self._runner.adapters.remove(serial)
            self._scheduler.index.forget_adapter(serial)

        del self._serials[name]
        try:
            await self._loop.call(remove)
        except FailedPreconditionError:
            self._serials[name] = serial
            raise
        log.info("event=adapter_unloaded name=%s", name)

    async def merge_adapter(self, name: str) -> None:
        """Serve an adapter merged into a copy of the weights; see `Engine.merge_adapter`."""
        if not self._config.merged_lane:
            raise FailedPreconditionError("engine.merged_lane is off: switch it on to merge adapters")
        await self._lane.move(name, self._serial(name))
        log.info("event=adapter_merged name=%s", name)

    async def sleep(self) -> None:
        """Raises FailedPreconditionError: this engine cannot give its memory back; see `Engine.sleep`."""
        raise FailedPreconditionError(
            "the transformers engine cannot sleep: serve with --engine vllm, or set learner.train.placement to another "
            "one; `nightschool doctor` lists those that this machine can run"
        )

    async def wake(self) -> None:
        """Nothing: it never sleeps."""

    def stats(self) -> EngineStats:
        """Counters for status and metrics."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=sum(self._num_waiting(practice) for practice in (True, False)),
            num_generated_tokens=self._loop.num_generated_tokens,
            num_prompt_tokens=self._loop.num_prompt_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            adapters=tuple(name for name in self._serials if name != BASE),
            merged=self._merged(),
            busy_s=self._loop.busy_s,
        )

    def healthy(self) -> bool:
        """Whether the engine still steps."""
        return self._loop.error is None

    async def close(self) -> None:
        """Abort what runs and end the threads; streams end with `cancelled`."""
        await asyncio.to_thread(self._loop.close)
        # What is being rendered ends in EngineDeadError; a cancelled future would look like the caller's own cancel.
        self._pool.shutdown(wait=False)

    def _read_adapter(self, folder: Path) -> AdapterWeights:
        parts = self._loaded.parts
        weights = read_adapter(folder, self._loaded.targets, self._config.max_lora_rank)
        return weights.to(parts.device, parts.dtype)

    def _merged(self) -> str:
        # Between the unloading of a name and its refusal the name is not there.
        return next((name for name, serial in self._serials.items() if serial == self._lane.serial), BASE)

    def _serial(self, adapter: str) -> int:
        if adapter not in self._serials:
            raise UnknownAdapterError(adapter)
        return self._serials[adapter]

    async def _render(self, prompt: Prompt) -> Rendered:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._loaded.renderer.render, prompt)

    def _num_waiting(self, practice: bool) -> int:
        return self._num_submitted[practice] - self._scheduler.num_left_queue[practice]

    def _submit(self, job: Job, adapter: str) -> None:
        if self._serials.get(adapter) != job.serial:
            raise UnknownAdapterError(adapter)
        practice = job.priority >= PRACTICE_PRIORITY
        waiting = self._num_waiting(practice)
        if waiting + len(job.sequences) > self._config.max_waiting + self._config.num_slots:
            raise OverloadedError(f"{waiting} sequences wait for a slot, at most {self._config.max_waiting} may")
        self._loop.submit(job)
        self._num_submitted[practice] += len(job.sequences)


def _num_threads(config: TransformersEngineConfig) -> int:
    return config.num_threads or max(1, (os.cpu_count() or 2) - 1)
