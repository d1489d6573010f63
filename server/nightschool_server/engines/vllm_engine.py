"""The engine on vLLM: its scheduler and kernels, our rendering, adapters and merged lane.

Owns the asynchronous face of the engine: which adapters there are, which requests hold them. The core's life is
`on_vllm/life.py`'s. See docs/vllm.md for what is asked of vLLM and what it costs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from nightschool_server.engines.lora import TargetLinear
from nightschool_server.engines.lora_files import read_adapter
from nightschool_server.engines.model_folder import ModelFolder, digested, read_model_folder
from nightschool_server.engines.on_vllm.answers import Answers, sampling_params
from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
from nightschool_server.engines.on_vllm.life import DEAD, CoreLife, call
from nightschool_server.engines.on_vllm.prompts import Prompts
from nightschool_server.engines.on_vllm.targets import adapter_targets
from nightschool_server.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    EngineDeadError,
    FailedPreconditionError,
    InvalidRequestError,
    OverloadedError,
    UnknownAdapterError,
)

log = logging.getLogger(__name__)


@dataclass
class _Adapter:
    number: int
    folder: Path
    num_requests: int = 0


class VLLMEngine:
    """An `Engine` (see `nightschool_server.engine`) over vLLM; make one with `start`."""

    def __init__(self, config: VLLMEngineConfig, folder: ModelFolder, targets: dict[str, TargetLinear]) -> None:
        self._config, self._folder, self._targets = config, folder, targets
        self._prompts = Prompts(folder)
        self._adapters: dict[str, _Adapter] = {BASE: _Adapter(1, Path("base"))}
        self._numbers = itertools.count(2)
        self._merged = BASE
        self._loading: set[str] = set()
        self._life = CoreLife(config, folder, self._bring_back)
        self._practice_room = asyncio.Semaphore(max(1, config.num_slots // 2))
        self._request_ids = itertools.count()
        self._in_flight = {True: 0, False: 0}
        self._busy_s, self._busy_since = 0.0, 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_generated = self._num_prompt = self._num_cached = 0

    @classmethod
    async def start(cls, config: VLLMEngineConfig) -> VLLMEngine:
        """Start vLLM and prove that it answers mixed batches rightly. Raises ModelFormatError, ConfigError."""
        began = time.monotonic()
        folder, targets = await asyncio.to_thread(_read_folder, config)
        engine = cls(config, folder, targets)
        # The weights are hashed while vLLM's processes start.
        hashing = asyncio.ensure_future(asyncio.to_thread(digested, folder))
        try:
            await engine._life.start()
            engine._folder = await hashing
        except BaseException:
            hashing.cancel()
            await engine.close()
            raise
        log.info("event=engine_started engine=vllm model=%s seconds=%.1f", config.model, time.monotonic() - began)
        return engine

    @property
    def kind(self) -> str:
        """The engine's name in the configuration."""
        return "vllm"

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        return self._folder.info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Stream the answers of a request; see `Engine.generate`. Raises OverloadedError besides."""
        core = self._life.core()
        self._adapter(request.adapter)
        check_sampling(request.sampling)
        # Greedy answers are all the same one, and vLLM refuses to make it twice.
        num_copies = request.sampling.n if request.sampling.temperature == 0 else 1
        request = replace(request, sampling=replace(request.sampling, n=request.sampling.n // num_copies))
        params = sampling_params(request.sampling, await self._prompts.grammar(request.prompt))
        rendered, num_prompt, _ = await self._prompts.render(core, request.prompt)
        check_length(num_prompt, request.sampling.max_tokens, self.model.context_length)
        num_cached = 0
        answers = Answers(self._folder.tokenizer, request.sampling, num_prompt)
        async with aclosing(self._run(request, rendered, params)) as outputs:
            async for output in outputs:
                num_cached = max(num_cached, output.num_cached_tokens or 0)
                for completion in output.outputs:
                    self._num_generated += len(completion.token_ids)
                    delta = answers.delta(completion, num_cached)
                    yield delta
                    for index in range(1, num_copies):
                        yield replace(delta, index=index, num_cached_tokens=num_prompt)
        self._num_prompt += num_prompt
        self._num_cached += num_cached

    async def score(self, prompt: Prompt, continuation: str, *, adapter: str = BASE, priority: int = 0) -> Scores:
        """Logprobs of a continuation; see `Engine.score`. Raises what `generate` raises."""
        from vllm.sampling_params import SamplingParams

        core = self._life.core()
        self._adapter(adapter)
        rendered, num_prompt, following = await self._prompts.render(core, prompt, continuation)
        if not following:
            raise InvalidRequestError("continuation", "the continuation has no tokens: give text to score")
        # vLLM must sample one token more.
        check_length(num_prompt, len(following) + 1, self.model.context_length)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        request = GenerateRequest("score", prompt, Sampling(max_tokens=1), adapter, priority)
        found: list[Any] = []
        async for output in self._run(request, rendered, params):
            found = output.prompt_logprobs or found
        logprobs = tuple(
            float(entry[token].logprob) for entry, token in zip(found[num_prompt:], following, strict=True)
        )
        self._num_prompt += num_prompt + len(following)
        return Scores(tuple(following), logprobs, num_prompt)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter servable; see `Engine.load_adapter`. Raises OverloadedError beyond `max_cpu_loras`."""
        self._life.core()
        if name in self._adapters or name in self._loading:
            raise AlreadyExistsError(f"adapter {name!r} is already loaded: names are never reused, give it a new one")
        if len(self._adapters) + len(self._loading) >= self._config.max_cpu_loras:
            raise OverloadedError(
                f"{len(self._adapters)} adapters are loaded, the base model included, and engine.max_cpu_loras is "
                f"{self._config.max_cpu_loras}: raise it, or wait until some have left"
            )
        self._loading.add(name)
        try:
            await asyncio.to_thread(read_adapter, folder, self._targets, self._config.max_lora_rank)
            adapter = _Adapter(next(self._numbers), folder)
            async with self._life.change:
                await _load(self._life.core(), name, adapter)
                self._adapters[name] = adapter
        finally:
            self._loading.discard(name)
        log.info("event=adapter_loaded name=%s number=%d", name, adapter.number)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; raises FailedPreconditionError where a request still holds it or it is merged."""
        adapter = self._adapter(name)
        if name == BASE:
            raise FailedPreconditionError("the base model cannot be unloaded: stop the server instead")
        if adapter.num_requests:
            raise FailedPreconditionError(f"adapter {name!r} is in use: wait until its requests have ended")
        if name == self._merged:
            raise FailedPreconditionError(f"adapter {name!r} is merged into the weights: merge another one first")
        del self._adapters[name]
        async with self._life.change:
            await call(self._life.core(), "nightschool_forget", adapter.number)
        log.info("event=adapter_unloaded name=%s", name)

    async def merge_adapter(self, name: str) -> None:
        """Run an adapter at the base model's speed; see `Engine.merge_adapter`."""
        self._adapter(name)
        if not self._config.merged_lane:
            raise FailedPreconditionError("the merged lane is switched off: set engine.merged_lane = true")
        async with self._life.change:
            if name == self._merged:
                return
            began = time.monotonic()
            await call(self._life.core(), "nightschool_merge", self._adapter(name).number)
            self._merged = name
            log.info("event=adapter_merged name=%s seconds=%.3f", name, time.monotonic() - began)

    async def sleep(self) -> None:
        """Leave the device to others; see `Engine.sleep`. On a CPU the processes end."""
        await self._life.sleep(self._idle.wait, self._numbers_to_prove())

    async def wake(self) -> None:
        """Serve again; see `Engine.wake`."""
        await self._life.wake(self._numbers_to_prove())

    def stats(self) -> EngineStats:
        """Counters for status and metrics."""
        in_flight = sum(self._in_flight.values())
        return EngineStats(
            num_running=min(in_flight, self._config.num_slots),
            num_waiting=max(0, in_flight - self._config.num_slots),
            num_generated_tokens=self._num_generated,
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=self._num_cached,
            adapters=tuple(name for name in self._adapters if name != BASE),
            merged=self._merged,
            busy_s=self._busy_s + (time.monotonic() - self._busy_since if in_flight else 0.0),
        )

    def healthy(self) -> bool:
        """Whether the engine serves; False while it sleeps and while a dead core is started again."""
        return self._life.serves()

    async def close(self) -> None:
        """Abort what runs and end vLLM's processes."""
        await self._life.close()
        self._prompts.close()

    def _numbers_to_prove(self) -> list[int]:
        return [self._adapters[name].number for name in dict.fromkeys((BASE, self._merged))]

    async def _bring_back(self, core: Any) -> None:
        """Give a new core the adapters that were loaded and the one that was merged."""
        for name, adapter in self._adapters.items():
            if name != BASE:
                await _load(core, name, adapter)
        if self._merged != BASE:
            await call(core, "nightschool_merge", self._adapters[self._merged].number)

    async def _run(self, request: GenerateRequest, rendered: Any, params: Any) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request, its adapter held and its place counted."""
        practice = request.priority >= PRACTICE_PRIORITY
        waiting = self._in_flight[practice] - self._config.num_slots
        if waiting + request.sampling.n > self._config.max_waiting:
            raise OverloadedError(f"{waiting} sequences wait for a slot, at most {self._config.max_waiting} may")
        adapter = self._adapter(request.adapter)
        adapter.num_requests += 1
        if not any(self._in_flight.values()):
            self._busy_since = time.monotonic()
        self._in_flight[practice] += request.sampling.n
        self._idle.clear()
        try:
            # Half of the slots stay free of practice, so that a live request never waits for one of its answers.
            async with (
                self._practice_room if practice else nullcontext(),
                aclosing(self._stream(request, adapter, rendered, params)) as outputs,
            ):
                async for output in outputs:
                    yield output
        finally:
            adapter.num_requests -= 1
            self._in_flight[practice] -= request.sampling.n
            if not any(self._in_flight.values()):
                self._busy_s += time.monotonic() - self._busy_since
                self._idle.set()

    async def _stream(
        self, request: GenerateRequest, adapter: _Adapter, rendered: Any, params: Any
    ) -> AsyncGenerator[Any, None]:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError as CoreDeadError

        lora = LoRARequest(lora_name=f"{adapter.number}", lora_int_id=adapter.number, lora_path=str(adapter.folder))
        request_id = f"{request.request_id}-{next(self._request_ids)}"
        try:
            running = self._life.core().generate(
                rendered, params, request_id, lora_request=lora, priority=request.priority
            )
            async with aclosing(running) as outputs:
                async for output in outputs:
                    yield output
        except CoreDeadError as error:
            raise EngineDeadError(DEAD) from error

    def _adapter(self, name: str) -> _Adapter:
        found = self._adapters.get(name)
        if found is None:
            raise UnknownAdapterError(name)
        return found


async def _load(core: Any, name: str, adapter: _Adapter) -> None:
    try:
        await call(core, "nightschool_load", adapter.number, name, str(adapter.folder))
    except EngineDeadError:
        raise
    except Exception as error:
        raise AdapterFormatError(f"vLLM cannot load {adapter.folder}: {error}") from error


def _read_folder(config: VLLMEngineConfig) -> tuple[ModelFolder, dict[str, TargetLinear]]:
    folder = read_model_folder(
        config.model, context_length=config.context_length, max_lora_rank=config.max_lora_rank, with_digest=False
    )
    return folder, adapter_targets(folder)
