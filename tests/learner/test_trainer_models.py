"""The trainer on other architectures than the shop's: a text model, and a VLM with three-dimensional positions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nightschool_learner.profiles import hyperparameters
from nightschool_learner.trainer_data import PairCollator, encode_pair, read_rows
from nightschool_learner.trainer_model import load_base, target_pattern
from nightschool_server.chat import ToolSpec, messages_from_json
from nightschool_server.config.training import TrainConfig
from nightschool_server.engine import Prompt
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from safetensors.torch import load_file

from tests.learner.training_data import make_run, train
from tests.server.tiny_models import make_idefics3, make_qwen2, make_qwen2_vl

MODELS = [
    (make_qwen2, 0, "model.layers."),
    (make_qwen2_vl, 6, ".language_model.layers."),
    (make_idefics3, 6, ".text_model.layers."),
]


@pytest.mark.parametrize(("make", "num_pictures", "tower"), MODELS)
async def test_it_trains_the_text_tower_and_the_engine_serves_what_was_trained(
    tmp_path: Path, make: Callable[[Path], Path], num_pictures: int, tower: str
) -> None:
    model = make(tmp_path / "model")
    trained = train(
        tmp_path / "run", model=model, num_text=6, num_pictures=num_pictures, epochs=2, rank=8, learning_rate=0.01
    )
    tensors = load_file(trained.result.adapter_folder / "adapter_model.safetensors")
    assert tensors
    assert all(tower in name for name in tensors)
    assert trained.result.num_pairs == 6 + num_pictures
    rows = trained.folder.read_metrics()
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]

    engine = await TransformersEngine.start(TransformersEngineConfig(str(model), num_slots=2))
    try:
        await engine.load_adapter("0001-trained", trained.result.adapter_folder)
        for probe, recorded in zip(trained.manifest.probes, trained.result.probe["logprobs"], strict=True):
            tools = tuple(ToolSpec(t["name"], t["description"], t["parameters"]) for t in probe.tools)
            prompt = Prompt(messages_from_json(probe.messages), tools)
            served = await engine.score(prompt, probe.continuation, adapter="0001-trained")
            assert list(served.logprobs) == pytest.approx(recorded, abs=2e-3)
            base = await engine.score(prompt, probe.continuation)
            assert max(abs(a - b) for a, b in zip(base.logprobs, recorded, strict=True)) > 0.01
    finally:
        await engine.close()


@pytest.mark.parametrize("make", [make_qwen2_vl, make_idefics3])
def test_a_mixed_batch_gives_what_the_engines_positions_give(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    model = make(tmp_path / "model")
    manifest = make_run(tmp_path / "run", model=model, num_text=2, num_pictures=2)
    base = load_base(str(model))
    pairs = [
        encode_pair(base.renderer, row, manifest.blobs, base.tokenizer.eos_token_id)
        for row in read_rows(manifest.pairs_file, manifest.pairs_sha256)
    ]
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model)
    together = logits_of(base.parts.model, collate([{"row": i} for i in range(4)]))
    for index, pair in enumerate(pairs):
        alone = logits_of(base.parts.model, collate([{"row": index}]))
        length = len(pair.prompt_ids) + len(pair.chosen_ids)
        assert torch.allclose(together[index, :length], alone[0, :length], atol=1e-3)


@pytest.mark.parametrize("make", [make_qwen2_vl, make_idefics3])
def test_no_profile_touches_the_vision_tower(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    base = load_base(str(make(tmp_path)))
    named = [name for name, _ in base.parts.model.named_modules()]
    for profile in ("card", "paper"):
        wanted = hyperparameters(TrainConfig.model_validate({"profile": profile}))
        pattern = target_pattern(base.targets, wanted.target_modules)
        adapted = [name for name in named if re.fullmatch(pattern, name)]
        assert {name.rpartition(".")[2] for name in adapted} >= {"q_proj", "k_proj", "v_proj"}
        assert not [name for name in adapted if "vis" in name or "connector" in name]
    assert not [name for name, parameter in base.parts.model.named_parameters() if parameter.requires_grad]


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[num_sequences, length, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**{k: v for k, v in batch.items() if k != "completion_mask"}).logits
    return logits
