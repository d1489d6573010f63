"""vLLM's engine, from its arguments to a started `AsyncLLM` and back.

Owns what we ask of vLLM; the processes that it starts are in `processes.py`.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any, Literal

from nightschool_server.engines.model_folder import ModelFolder
from nightschool_server.engines.on_vllm.plugin import SERVER_PID_VARIABLE
from nightschool_server.engines.on_vllm.processes import CoreProcesses
from nightschool_server.errors import ConfigError, ModelFormatError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's max_lora_rank."""

MAX_LOGPROBS = 100
_CPU_BLOCK_TOKENS = 32
_MAX_CPU_CACHE_BYTES = 4 * 2**30
_MIN_IMAGE_BATCH_TOKENS = 2048
_WORKER_EXTENSION = "nightschool_server.engines.on_vllm.worker.LaneExtension"


@dataclass(frozen=True)
class VLLMEngineConfig:
    """How a model is served by vLLM."""

    model: str
    """A folder or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on CUDA and float32 on a CPU."""
    num_slots: int = 32
    """Sequences that run at once."""
    context_length: int = 0
    """Tokens of prompt and answer together; 0 is the model's own."""
    max_lora_rank: int = 64
    max_loras: int = 4
    """Different adapters that one step may have, the base model counted where another one is merged."""
    max_cpu_loras: int = 16
    """Adapters that the engine keeps."""
    merged_lane: bool = True
    """Whether one adapter may be merged into the weights."""
    prefill_chunk_tokens: int = 512
    """Prompt tokens computed in one step."""
    max_waiting: int = 1024
    """Sequences that may wait, live and practice counted apart; more are refused."""
    memory_fraction: float = 0.9
    """Of a GPU's memory, weights and cache together."""
    cache_bytes: int = 0
    """Of keys and values; 0 is what a full load needs on a CPU, and what is left of a GPU's share."""
    sleep: bool = False
    """Whether the weights may leave the GPU while a trainer has it."""
    pin_cores: bool = True
    """Keep EngineCore on the worker's core on machines of few cores."""
    self_test: bool = True
    """Prove at start that mixed batches are answered rightly."""

    @property
    def engine_rank(self) -> int:
        """vLLM's max_lora_rank: what an adapter minus the merged one needs."""
        needed = self.max_lora_rank * (2 if self.merged_lane else 1)
        found = next((rank for rank in RANKS if rank >= needed), None)
        if found is None:
            raise ConfigError(
                f"engine.max_lora_rank {self.max_lora_rank} needs rank {needed} of vLLM, whose most is {RANKS[-1]}: "
                "lower it, or set engine.merged_lane = false"
            )
        return found


async def start_core(config: VLLMEngineConfig, folder: ModelFolder) -> Any:
    """A started `AsyncLLM`; takes from 15 seconds to minutes, and the event loop goes on. Raises ModelFormatError."""
    _prepare_environment()
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(config, folder, is_cpu=current_platform.is_cpu())
    # The backend that TransformersEngine has too, so that one grammar guides both.
    guidance = StructuredOutputsConfig(backend="guidance")
    asked = AsyncEngineArgs(**arguments, structured_outputs_config=guidance)
    starting = asyncio.ensure_future(asyncio.to_thread(AsyncLLM.from_engine_args, asked))
    try:
        core = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Its processes would outlive whoever waited for them.
        core = (await asyncio.gather(starting, return_exceptions=True))[0]
        if isinstance(core, AsyncLLM):
            await asyncio.to_thread(CoreProcesses.of(core).end, core)
        raise
    except Exception as error:
        # What vLLM refuses about a model is raised in another process, and said there.
        raise ModelFormatError(
            f"vLLM does not start with model {config.model!r} ({error}): the lines above say why; another model, or "
            "--engine transformers, may do"
        ) from error
    if config.pin_cores and current_platform.is_cpu():
        CoreProcesses.of(core).pin_to_worker()
    return core


def engine_arguments(config: VLLMEngineConfig, folder: ModelFolder, *, is_cpu: bool) -> dict[str, Any]:
    """What `AsyncEngineArgs` is called with."""
    context = folder.info.context_length
    dtype = ("float32" if is_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    batch = max(config.prefill_chunk_tokens, config.num_slots, _MIN_IMAGE_BATCH_TOKENS if folder.sees else 0)
    arguments: dict[str, Any] = {
        "model": str(folder.path),
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": config.num_slots,
        "max_num_batched_tokens": batch,
        "enable_lora": True,
        "max_loras": config.max_loras,
        "max_cpu_loras": max(config.max_cpu_loras, config.max_loras),
        "max_lora_rank": config.engine_rank,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "worker_extension_cls": _WORKER_EXTENSION,
        "max_logprobs": MAX_LOGPROBS,
        "disable_log_stats": True,
        "gpu_memory_utilization": config.memory_fraction,
    }
    if folder.sees:
        arguments["skip_mm_profiling"] = True
    if is_cpu:
        arguments["block_size"] = _CPU_BLOCK_TOKENS
    elif config.sleep:
        arguments["enable_sleep_mode"] = True
    cache = config.cache_bytes or (_cpu_cache_bytes(config, folder, dtype) if is_cpu else 0)
    if cache:
        arguments["kv_cache_memory_bytes"] = cache
    return arguments


def sleeps_in_place(config: VLLMEngineConfig) -> bool:
    """Whether a core can give a GPU's memory back and take it again; on a CPU vLLM's sleep does nothing."""
    from vllm.platforms import current_platform

    return config.sleep and not current_platform.is_cpu()


def _prepare_environment() -> None:
    os.environ[SERVER_PID_VARIABLE] = str(os.getpid())
    for name, value in (
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
    ):
        os.environ.setdefault(name, value)


def _cpu_cache_bytes(config: VLLMEngineConfig, folder: ModelFolder, dtype: str) -> int:
    """Keys and values of every slot at full context, with as much again for prefixes, within a bound."""
    text = folder.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)
    wanted = 2 * per_token * config.num_slots * folder.info.context_length
    return int(min(wanted, _MAX_CPU_CACHE_BYTES))
