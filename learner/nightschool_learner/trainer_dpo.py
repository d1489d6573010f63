"""TRL's DPOTrainer as this project uses it: our tokens, our batches, metrics as lines.

Deviations from TRL 1.16, each with its reason: the dataset is not prepared by TRL, its rows are indices of pairs
that the collator holds as tokens (see `trainer_data.py`); TRL sees no images, the collator brings them, so that
reference logprobs can be computed once for pairs with images too.

Source of the loss: DPO (arXiv 2305.18290, eq. 7), or another of TRL's losses of pairs (IPO, arXiv 2310.12036; robust
DPO, arXiv 2403.00409; EXO, arXiv 2402.00856; ...), plus nll_weight * NLL of the chosen answer per token
(arXiv 2404.19733, eq. 2, which divides by the tokens of prompt and answer together), plus anchor_weight * NLL of
the batch's anchors per answer (the term that holds an RLHF policy to other data, arXiv 2203.02155, eq. 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from nightschool_learner.manifest import Manifest, Phase
from nightschool_learner.trainer_data import ANCHORS
from nightschool_learner.trainer_model import Student
from nightschool_learner.trainer_rows import Material

MAX_LOG_RATIO = 20.0
"""Beyond it the exponential says nothing but "far"."""

_NOT_SHOWN = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})
"""Parts of a batch that are not for the model."""

MAX_CHECKPOINTS = 2
"""The last whole one survives a kill while the next is written."""


class ExactDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A DPOTrainer that takes the token ids that it is given, and holds the likelihood of anchors."""

    anchor_weight = 0.0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.reference_logprobs: dict[bytes, torch.Tensor] = {}
        """Of the batches that are looked at again and again, by their tokens."""
        super().__init__(*arguments, **settings)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """TRL's hook for rendering and tokenizing: the dataset holds the tokens already."""
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's hook for the reference's logprobs of pairs; anchors have none."""
        inputs.pop(ANCHORS, None)
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss of the pairs, plus that of the anchors that came with them."""
        anchors = inputs.pop(ANCHORS, None)
        mode = "train" if self.model.training else "eval"
        computed = super()._compute_loss(model, inputs, return_outputs)
        if mode == "eval":
            self._note_kl(model, anchors or inputs, len(inputs["input_ids"]) // 2 if anchors is None else None)
        if anchors is None or not self.anchor_weight:
            return computed
        # Of an answer, not of a token: whether to answer or to call a tool is one token of a short answer, and a mean
        # over tokens would leave it to the long ones.
        logprobs, spoken = self._token_logprobs(model, anchors)
        nll = -(logprobs * spoken).sum(1).mean()
        self._metrics[mode]["nll/anchors"].append(nll.item())
        loss, *outputs = computed if return_outputs else (computed,)
        loss = loss + self.anchor_weight * nll
        return (loss, *outputs) if return_outputs else loss

    @staticmethod
    def _token_logprobs(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs [num_sequences, length - 1] and which of them are of an answer, by TRL's forward for pairs."""
        shown = {key: value for key, value in batch.items() if key not in _NOT_SHOWN}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logprobs = model(**shown, labels=labels, fused_lm_head=True, use_cache=False).log_probs
        spoken = batch["completion_mask"][:, 1:]
        return logprobs[:, -spoken.size(1) :], spoken

    def _note_kl(self, model: Any, batch: Mapping[str, Any], num_rows: int | None) -> None:
        """Estimate KL(reference | policy) in nats a token from the answers of the first `num_rows` sequences.

        The answers were sampled from the reference, so r - 1 - log r with r = policy / reference is unbiased
        and never negative (Schulman 2020, "k3"), but for what their selection adds.
        """
        key = batch["input_ids"].cpu().numpy().tobytes()
        policy, spoken = self._token_logprobs(model, batch)
        if key not in self.reference_logprobs:
            with reference_of(self):
                self.reference_logprobs[key] = self._token_logprobs(model, batch)[0]
        log_ratio = ((policy - self.reference_logprobs[key]) * spoken)[:num_rows].clamp(max=MAX_LOG_RATIO)
        kl = (log_ratio.exp() - 1 - log_ratio).sum() / spoken[:num_rows].sum()
        self._metrics["eval"]["kl"].append(kl.item())


@contextmanager
def reference_of(trainer: DPOTrainer) -> Iterator[None]:
    """The model as the run found it, for as long as the block runs: without adapter, or with its frozen copy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad(), use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield


class MetricsWriter(TrainerCallback):  # type: ignore[misc]
    """Appends one line a logged step to metrics.jsonl and tells progress."""

    def __init__(self, path: Path, tell: Callable[[Phase, int, int], None]) -> None:
        self._path = path
        self._tell = tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "num_steps": state.max_steps, **numbers}) + "\n")
        self._tell("training", state.global_step, state.max_steps)


def make_trainer(
    student: Student, material: Material, manifest: Manifest, callbacks: list[TrainerCallback]
) -> ExactDPOTrainer:
    """A trainer ready to train. Reference logprobs are computed here, once, where there are several epochs."""
    dataset = material.dataset(held_back=False)
    trainer = ExactDPOTrainer(
        model=student.model,
        args=_config(manifest, len(dataset)),
        data_collator=material.collator,
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


def _config(manifest: Manifest, num_pairs: int) -> DPOConfig:
    wanted = manifest.hyperparameters
    on_gpu = torch.cuda.is_available()
    steps = wanted.epochs * math.ceil(math.ceil(num_pairs / wanted.batch_size) / wanted.accumulation)
    return DPOConfig(
        output_dir=str(manifest.output / "checkpoints"),
        per_device_train_batch_size=wanted.batch_size,
        per_device_eval_batch_size=wanted.batch_size,
        gradient_accumulation_steps=wanted.accumulation,
        num_train_epochs=wanted.epochs,
        learning_rate=wanted.learning_rate,
        lr_scheduler_type=wanted.scheduler,
        warmup_steps=round(steps * wanted.warmup_share),
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.max_grad_norm,
        beta=wanted.beta,
        label_smoothing=wanted.label_smoothing,
        loss_type=[wanted.loss, "sft"],
        loss_weights=[1.0, wanted.nll_weight],
        max_length=None,
        precompute_ref_log_probs=wanted.epochs > 1,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=wanted.checkpoint_steps,
        save_total_limit=MAX_CHECKPOINTS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=manifest.seed % 2**32,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu
        if wanted.gradient_checkpointing == "auto"
        else wanted.gradient_checkpointing == "on",
        dataloader_pin_memory=on_gpu,
    )
