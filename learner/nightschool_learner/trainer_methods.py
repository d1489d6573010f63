"""TRL's trainers of pairs (DPO), of good answers (SFT) and of good and bad ones (KTO), on our tokens.

Source of the losses: DPO (arXiv 2305.18290, eq. 7), or another of TRL's losses of pairs (IPO, arXiv 2310.12036; robust
DPO, arXiv 2403.00409; EXO, arXiv 2402.00856; ...), plus nll_weight * NLL of the chosen answer per token
(arXiv 2404.19733, eq. 2, which divides by the tokens of prompt and answer together); NLL per token; KTO
(arXiv 2402.01306, eq. 7), both kinds of answers weighing alike (eq. 8). Anchors are added to each (`trainer_exact.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer

from nightschool_learner.manifest import Manifest
from nightschool_learner.trainer_data import ANCHORS
from nightschool_learner.trainer_exact import ExactTokens, keep_reference
from nightschool_learner.trainer_model import Student
from nightschool_learner.trainer_rows import Material

MAX_CHECKPOINTS = 2
"""The last whole one survives a kill while the next is written."""


class ExactDPOTrainer(ExactTokens, DPOTrainer):  # type: ignore[misc]
    """Learns which of two answers is better."""

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's hook for the reference's logprobs of pairs; anchors have none."""
        inputs.pop(ANCHORS, None)
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss of the pairs, plus that of the anchors that came with them."""
        anchors = inputs.pop(ANCHORS, None)
        computed = super()._compute_loss(model, inputs, return_outputs)
        if self.mode == "eval":
            is_chosen = slice(len(inputs["input_ids"]) // 2)
            self.note_kl(model, anchors or inputs, slice(None) if anchors else is_chosen)
        return self.with_anchors(computed, anchors, model)


class ExactSFTTrainer(ExactTokens, SFTTrainer):  # type: ignore[misc]
    """Learns good answers."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        """TRL's NLL of the answers, plus that of the anchors that came with them."""
        anchors, batch = inputs.pop(ANCHORS, None), dict(inputs)
        inputs.pop("completion_mask")
        computed = super().compute_loss(model, inputs, return_outputs, **more)
        if self.mode == "eval":
            self.note_kl(model, anchors or batch)
        return self.with_anchors(computed, anchors, model)


class ExactKTOTrainer(ExactTokens, KTOTrainer):  # type: ignore[misc]
    """Learns which answers are good and which are not."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss of the answers, plus that of the anchors that came with them."""
        anchors = inputs.pop(ANCHORS, None)
        computed = super()._compute_loss(model, inputs, return_outputs)
        if self.mode == "eval":
            self.note_kl(model, anchors or inputs, slice(None) if anchors else inputs["label"].bool())
        return self.with_anchors(computed, anchors, model)


def make_trainer(student: Student, material: Material, manifest: Manifest, callbacks: list[TrainerCallback]) -> Any:
    """A trainer ready to train. DPO's reference logprobs are computed here, once, for several epochs of one process."""
    dataset, method = material.dataset(held_back=False), manifest.hyperparameters.method
    if method == "sft" and student.lora is None:
        keep_reference(student.model)
    kind, config = {
        "dpo": (ExactDPOTrainer, _dpo),
        "sft": (ExactSFTTrainer, _sft),
        "kto": (ExactKTOTrainer, _kto),
    }[method]
    trainer = kind(
        model=student.model,
        args=config(manifest, dataset),
        data_collator=material.batches,
        train_dataset=dataset,
        eval_dataset=material.dataset(held_back=True) if material.held_pairs else None,
        processing_class=student.loaded.tokenizer,
        peft_config=student.lora,
        callbacks=callbacks,
    )
    trainer.anchor_weight = manifest.hyperparameters.anchor_weight
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    return trainer


def _dpo(manifest: Manifest, dataset: Any) -> DPOConfig:
    wanted = manifest.hyperparameters
    return DPOConfig(
        **_common(manifest, len(dataset)),
        beta=wanted.beta,
        label_smoothing=wanted.label_smoothing,
        loss_type=[wanted.loss, "sft"],
        loss_weights=[1.0, wanted.nll_weight],
        # TRL hands them to other processes by a file that datasets in memory keep for themselves.
        precompute_ref_log_probs=wanted.epochs > 1 and manifest.num_processes == 1,
    )


def _sft(manifest: Manifest, dataset: Any) -> SFTConfig:
    return SFTConfig(**_common(manifest, len(dataset)), dataset_kwargs={"skip_prepare_dataset": True}, loss_type="nll")


def _kto(manifest: Manifest, dataset: Any) -> KTOConfig:
    num_good = max(1, sum(dataset["label"]))
    return KTOConfig(
        **_common(manifest, len(dataset)),
        beta=manifest.hyperparameters.beta,
        undesirable_weight=num_good / max(1, len(dataset) - num_good),
        train_sampling_strategy="sequential",
    )


def _common(manifest: Manifest, num_rows: int) -> dict[str, Any]:
    """What every method's configuration says."""
    wanted = manifest.hyperparameters
    on_gpu = torch.cuda.is_available()
    rows_at_once = wanted.batch_size * manifest.num_processes
    steps = wanted.epochs * math.ceil(math.ceil(num_rows / rows_at_once) / wanted.accumulation)
    return {
        "output_dir": str(manifest.output / "checkpoints"),
        "per_device_train_batch_size": wanted.batch_size,
        "per_device_eval_batch_size": wanted.batch_size,
        "gradient_accumulation_steps": wanted.accumulation,
        "num_train_epochs": wanted.epochs,
        "learning_rate": wanted.learning_rate,
        "lr_scheduler_type": wanted.scheduler,
        "warmup_steps": round(steps * wanted.warmup_share),
        "weight_decay": wanted.weight_decay,
        "max_grad_norm": wanted.max_grad_norm,
        "max_length": None,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": wanted.checkpoint_steps,
        "save_total_limit": MAX_CHECKPOINTS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": manifest.seed % 2**32,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu
        if wanted.gradient_checkpointing == "auto"
        else wanted.gradient_checkpointing == "on",
        "dataloader_pin_memory": on_gpu,
        # Every adapted layer is in every forward; looking for unused ones fails where a step has two forwards.
        "ddp_find_unused_parameters": False,
    }
