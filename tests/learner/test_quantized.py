"""Training on a base in 4 bits: refused without bitsandbytes; with it, the adapter is proved on the served base."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from nightschool_learner.trainer_data import score_text
from nightschool_learner.trainer_model import load_base
from peft import PeftModel

from tests.learner.training_data import MODEL, finished, make_run, run_trainer


def test_four_bits_need_bitsandbytes_and_prove_the_adapter_on_the_served_base(tmp_path: Path) -> None:
    manifest = make_run(tmp_path, num_text=8, num_pictures=2, quantize="nf4", epochs=3, learning_rate=3e-3)
    if importlib.util.find_spec("bitsandbytes") is None:
        done = run_trainer(manifest)
        assert done.returncode == 2
        assert "learner.train.quantize is 'nf4', which needs bitsandbytes where training runs" in done.stderr
        return
    run = finished(manifest)
    assert run.result.metrics["rewards/margins"] > 0
    served = PeftModel.from_pretrained(load_base(str(MODEL)).parts.model, str(run.result.adapter_folder))
    for probe, recorded in zip(manifest.probes, run.result.probe["logprobs"], strict=True):
        assert score_text(served, load_base(str(MODEL)).renderer, probe) == pytest.approx(recorded, abs=1e-3)
