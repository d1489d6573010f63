"""What we rely on in a running engine of vLLM 0.32, one fact a test; see `test_contract.py`. All share one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import pytest_asyncio
from nightschool_server.engines.model_folder import read_model_folder
from nightschool_server.engines.on_vllm import core
from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
from nightschool_server.engines.on_vllm.processes import CoreProcesses, is_engine
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from tests.server.tiny_models import make_qwen2

PROMPT = list(range(30, 110))
"""Token ids, more than two blocks of the prefix cache."""

NUM_SLOTS = 2


@dataclass(frozen=True)
class Started:
    """vLLM's engine with our extension, none of our own engine around it."""

    core: Any
    handler: Any
    """`output_handler` before the first request."""

    async def run(
        self, name: str, *, number: int = 1, num_tokens: int = 1, priority: int = 0, salt: str = "", runs: Any = None
    ) -> Any:
        """Run `PROMPT` greedily to its last output; `runs` is set at the first one."""
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=0, ignore_eos=True)
        lora = LoRARequest(lora_name=f"{number}", lora_int_id=number, lora_path="nowhere")
        asked = {"type": "token", "prompt_token_ids": PROMPT, **({"cache_salt": salt} if salt else {})}
        async for output in self.core.generate(asked, params, name, lora_request=lora, priority=priority):
            last = output
            if runs is not None:
                runs.set()
        return last


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Started]:
    home = str(make_qwen2(tmp_path_factory.mktemp("contract") / "model"))
    folder = read_model_folder(home, context_length=0, max_lora_rank=4)
    engine = await core.start_core(VLLMEngineConfig(model=home, num_slots=NUM_SLOTS, max_lora_rank=4), folder)
    found = Started(engine, engine.output_handler)
    await engine.collective_rpc("nightschool_open")
    for number in (2, 3):
        await engine.collective_rpc("nightschool_randomise", args=(number, 4, 0.05))
    yield found
    await asyncio.to_thread(engine.shutdown)


on_the_engine = pytest.mark.asyncio(loop_scope="module")


@on_the_engine
async def test_an_engine_made_on_a_thread_has_no_output_handler_until_it_is_asked(started: Started) -> None:
    """on_vllm/life.py: _end, which cancels it where there is one."""
    assert started.handler is None
    await started.run("first")
    assert isinstance(started.core.output_handler, asyncio.Task)
    assert not started.core.errored


@on_the_engine
async def test_the_worker_is_below_enginecore_and_both_say_so_in_their_titles(started: Started) -> None:
    """on_vllm/processes.py: CoreProcesses, is_engine."""
    (engine,) = [process for process in psutil.Process().children() if is_engine(process)]
    (worker,) = [process for process in engine.children() if is_engine(process)]
    told = CoreProcesses.of(started.core)
    assert ([process.pid for process in told.cores], list(told.workers)) == ([engine.pid], [worker])
    assert len(worker.cpu_affinity()) < (psutil.cpu_count() or 1)


@on_the_engine
async def test_blocks_are_shared_by_one_adapter_with_one_salt_alone(started: Started) -> None:
    """vllm_engine.py: _stream; on_vllm/core.py: _CPU_BLOCK_TOKENS; on_vllm/mixed_test.py: _run."""
    cached = []
    for index, (number, salt) in enumerate([(2, "one"), (2, "one"), (3, "one"), (2, "two")]):
        output = await started.run(f"cache-{index}", number=number, salt=salt)
        cached.append(output.num_cached_tokens)
    assert cached == [0, len(PROMPT) // core._CPU_BLOCK_TOKENS * core._CPU_BLOCK_TOKENS, 0, 0]


@on_the_engine
async def test_a_logprob_without_others_is_that_of_the_token(started: Started) -> None:
    """on_vllm/answers.py: delta; on_vllm/mixed_test.py: _run."""
    (completion,) = (await started.run("logprobs", num_tokens=3)).outputs
    assert [list(entry) for entry in completion.logprobs] == [[token] for token in completion.token_ids]


@on_the_engine
async def test_a_running_answer_is_not_interrupted_for_an_urgent_one(started: Started) -> None:
    """vllm_engine.py: _run, which therefore keeps half of the slots free of practice."""
    order: list[str] = []
    running = [asyncio.Event() for _ in range(NUM_SLOTS)]

    async def note(name: str, num_tokens: int, priority: int, runs: asyncio.Event) -> None:
        await started.run(name, num_tokens=num_tokens, priority=priority, runs=runs)
        order.append(name)

    late = [asyncio.create_task(note(f"late-{i}", 100, 10, runs)) for i, runs in enumerate(running)]
    await asyncio.gather(*(runs.wait() for runs in running))
    await asyncio.gather(note("urgent", 1, 0, asyncio.Event()), *late)
    assert order[0].startswith("late")


@on_the_engine
async def test_sleep_on_a_cpu_is_claimed_and_frees_nothing(started: Started) -> None:
    """on_vllm/core.py: engine_arguments, which asks for it elsewhere only."""
    before = await started.core.collective_rpc("nightschool_checksum")
    await started.core.sleep(1)
    assert await started.core.is_sleeping()
    assert await started.core.collective_rpc("nightschool_checksum") == before
    await started.core.wake_up()
    assert not await started.core.is_sleeping()
