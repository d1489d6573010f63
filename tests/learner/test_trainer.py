"""One real training run of the real tiny model, and what must be true of what it leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from nightschool_learner.errors import StageFailedError
from nightschool_learner.trainer import last_whole_checkpoint, publish
from nightschool_learner.trainer_data import score_text
from nightschool_learner.trainer_model import load_base, target_pattern
from peft import PeftModel
from safetensors.torch import load_file

from tests.learner.training_data import LEARNS, MODEL, Trained, make_run, run_trainer, train

FILES = ["adapter_config.json", "adapter_model.safetensors", "provenance.json"]


@pytest.fixture(scope="module")
def continued(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A second adapter that continues the first."""
    folder = tmp_path_factory.mktemp("continued")
    return train(folder, seed=4, epochs=2, learning_rate=1e-5, parent=trained.result.adapter_folder)


def test_published_folder_holds_peft_files_provenance_and_nothing_else(trained: Trained) -> None:
    names = sorted(path.name for path in trained.result.adapter_folder.iterdir())
    assert names == FILES
    config = json.loads((trained.result.adapter_folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (64, 16.0, "LORA")


def test_only_the_text_tower_is_adapted(trained: Trained) -> None:
    tensors = load_file(trained.result.adapter_folder / "adapter_model.safetensors")
    assert tensors
    assert all(".text_model.layers." in name for name in tensors)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name)


def test_it_learns_what_the_pairs_say(trained: Trained) -> None:
    rows = trained.folder.read_metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert trained.result.metrics["rewards/accuracies"] > 0.8
    assert trained.result.metrics["rewards/margins"] > 0
    assert trained.result.metrics["log_ratio/chosen"] > 0


def test_every_step_is_logged_once_and_the_result_counts_them(trained: Trained) -> None:
    rows = trained.folder.read_metrics()
    assert [row["step"] for row in rows] == list(range(1, trained.result.num_steps + 1))
    assert trained.result.num_pairs == 18
    assert trained.result.num_steps == 6 * 5
    progress = trained.folder.read_progress()
    assert (progress.phase, progress.step, progress.num_steps) == ("done", 30, 30)


def test_the_first_step_starts_at_the_reference(trained: Trained, continued: Trained) -> None:
    for run in (trained, continued):
        first = run.folder.read_metrics()[0]
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)


def test_published_adapter_gives_the_recorded_probe_logprobs_in_peft(trained: Trained) -> None:
    base = load_base(str(MODEL))
    before = [score_text(base.parts.model, base.renderer, probe) for probe in trained.manifest.probes]
    adapted = PeftModel.from_pretrained(base.parts.model, str(trained.result.adapter_folder))
    after = [score_text(adapted, base.renderer, probe) for probe in trained.manifest.probes]
    recorded = trained.result.probe["logprobs"]
    for mine, theirs, plain in zip(after, recorded, before, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert max(abs(a - b) for a, b in zip(mine, plain, strict=True)) > 0.01
    assert len(trained.result.probe["prompts"]) == 2
    assert trained.result.probe["prompts"][0] == trained.manifest.probes[0].model_dump(mode="json")


def test_a_continued_adapter_starts_from_its_parent_and_keeps_its_shape(trained: Trained, continued: Trained) -> None:
    parent = load_file(trained.result.adapter_folder / "adapter_model.safetensors")
    child = load_file(continued.result.adapter_folder / "adapter_model.safetensors")
    assert parent.keys() == child.keys()
    moved = max(float((parent[name] - child[name]).abs().max()) for name in parent)
    assert 0 < moved < 1e-3
    assert continued.result.target_modules == trained.result.target_modules
    names = sorted(path.name for path in continued.result.adapter_folder.iterdir())
    assert names == FILES


def test_the_base_model_is_untouched(trained: Trained) -> None:
    base = dict(load_base(str(MODEL)).parts.model.named_parameters())
    adapted = PeftModel.from_pretrained(load_base(str(MODEL)).parts.model, str(trained.result.adapter_folder))
    for name, parameter in adapted.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer.", ".")]), name


def test_the_same_seed_gives_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    again = train(tmp_path, **LEARNS)
    weights = "adapter_model.safetensors"
    assert (again.result.adapter_folder / weights).read_bytes() == (
        trained.result.adapter_folder / weights
    ).read_bytes()


def test_a_finished_run_is_not_run_again(trained: Trained) -> None:
    before = trained.folder.result.stat().st_mtime_ns
    assert run_trainer(trained.manifest).returncode == 0
    assert trained.folder.result.stat().st_mtime_ns == before


def test_pairs_that_changed_after_the_manifest_are_refused(tmp_path: Path) -> None:
    manifest = make_run(tmp_path)
    manifest.pairs_file.write_text(manifest.pairs_file.read_text() + "\n")
    done = run_trainer(manifest)
    assert done.returncode == 2
    assert "pairs.jsonl has sha256" in done.stderr
    assert "the file changed after the run began" in done.stderr
    assert not (manifest.output / "result.json").exists()


def test_no_pair_that_fits_is_a_sentence_with_the_setting(tmp_path: Path) -> None:
    done = run_trainer(make_run(tmp_path, max_length=16))
    assert done.returncode == 2
    assert "none of 18 pairs fits 16 tokens" in done.stderr


def test_a_base_model_that_is_not_the_served_one_is_refused(tmp_path: Path) -> None:
    manifest = make_run(tmp_path)
    changed = manifest.model_copy(update={"base_digest": "0" * 64})
    (manifest.output / "manifest.json").write_text(changed.model_dump_json())
    done = run_trainer(manifest)
    assert done.returncode == 2
    assert "the server serves 000000000000" in done.stderr


def test_a_pattern_covers_exactly_what_is_asked_for() -> None:
    names = [f"model.text.layers.{i}.{name}" for i in (0, 11) for name in ("attn.q_proj", "attn.k_proj", "mlp.up_proj")]
    names_elsewhere = ["model.vision.layers.0.attn.q_proj", "lm_head", "model.text.layers.0.attn.q_proj.base_layer"]
    everything, some = target_pattern(names), target_pattern(names, ("q_proj", "k_proj"))
    assert [bool(re.fullmatch(everything, name)) for name in names] == [True] * 6
    assert [name for name in names if re.fullmatch(some, name)] == [n for n in names if not n.endswith("up_proj")]
    assert not any(re.fullmatch(everything, name) for name in names_elsewhere)


def test_an_unknown_layer_is_refused_with_those_that_exist() -> None:
    with pytest.raises(StageFailedError, match=r"\['w_proj'\].*\['q_proj'\]"):
        target_pattern(["layers.0.q_proj"], ("q_proj", "w_proj"))


def test_a_cut_off_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    found = last_whole_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-4"
    assert last_whole_checkpoint(tmp_path / "checkpoint-4") is None


def test_publishing_again_replaces_the_folder_as_a_whole(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "junk").mkdir(parents=True)
    model = PeftModel.from_pretrained(load_base(str(MODEL)).parts.model, str(trained.result.adapter_folder))
    publish(model, folder, {"cycle_id": "cycle_test"})
    assert sorted(path.name for path in folder.iterdir()) == FILES
