"""Which engine runs the model: from the configuration to a started engine.

Owns the choice and the refusal of a model that is not named. torch is imported only below here, so that the command
line answers at once.
"""

from __future__ import annotations

from typing import Any, cast

from nightschool_server.config.serving import EngineConfig
from nightschool_server.engine import Engine
from nightschool_server.errors import ConfigError


async def start_engine(config: EngineConfig) -> Engine:
    """The engine with its model loaded; takes from seconds to minutes.

    Raises ConfigError where no model is named, ModelFormatError for one that cannot be served.
    """
    if not config.model:
        raise ConfigError("engine.model is empty: name a model folder or hub id, e.g. --model examples/shop/model")
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
            num_threads=config.num_threads,
            max_waiting=config.max_waiting,
            merged_lane=config.merged_lane,
        )
    )


def engine_kind(config: EngineConfig) -> str:
    """The name of the engine that `start_engine` takes."""
    return "transformers" if config.kind == "auto" else config.kind
