"""Which engine `auto` takes where vLLM is installed, and the reason that the log gives; no engine is started."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from nightschool_server.config.serving import EngineConfig
from nightschool_server.engine_factory import engine_kind

from tests.server.tiny_models import make_idefics3, make_qwen2, make_qwen2_vl


def narrow(folder: Path) -> Path:
    return make_qwen2(folder, num_attention_heads=4, num_key_value_heads=2)


def unknown(folder: Path) -> Path:
    """A model whose architecture transformers reads by its type, and vLLM by its name."""
    config = make_qwen2(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["Qwen2ForNobody"]}))
    return folder


@pytest.mark.parametrize("make", [make_qwen2, make_idefics3])
def test_auto_takes_vllm_for_a_model_that_it_serves(
    make: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert engine_kind(EngineConfig(model=str(make(tmp_path / "model")))) == "vllm"
    assert "engine_chosen" not in caplog.text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (narrow, "vllm_on_cpu_has_no_heads_of_width_16"),
        (unknown, "vllm_has_no_Qwen2ForNobody"),
        (make_qwen2_vl, "Qwen2VLForConditionalGeneration_needs_torchvision"),
    ],
)
def test_auto_takes_transformers_for_one_that_it_does_not_and_says_why(
    make: Callable[[Path], Path], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert engine_kind(EngineConfig(model=str(make(tmp_path / "model")))) == "transformers"
    assert f"event=engine_chosen engine=transformers reason={reason}" in caplog.text


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_an_engine_that_is_named_is_taken_whatever_the_model(kind: str, tmp_path: Path) -> None:
    assert engine_kind(EngineConfig.model_validate({"model": str(tmp_path), "kind": kind})) == kind
