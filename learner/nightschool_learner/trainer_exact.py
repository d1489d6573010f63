"""What all of the trainers share: our tokens in place of TRL's preparation, anchors, distances, metrics as lines.

A mixin over TRL's trainers. The dataset is not prepared by TRL, its rows are indices of rows that the collator holds as
tokens (`trainer_data.py`, `trainer_answers.py`); TRL sees no images, the collator brings them. Deviation from TRL: the
NLL of the batch's anchors is added to the loss, per answer (the term that holds an RLHF policy to other data,
arXiv 2203.02155, eq. 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

from nightschool_learner.manifest import Phase
from nightschool_learner.trainer_life import rank

MAX_LOG_RATIO = 20.0
"""Beyond it the exponential says nothing but "far"."""

_NOT_SHOWN = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "labels", "label"})
"""Parts of a batch that are not for the model; nor are KTO's mismatched sequences."""


class ExactTokens:
    """Mixed into a trainer of TRL's, before it."""

    anchor_weight = 0.0
    model: Any
    accelerator: Any
    callback_handler: Any
    remove_callback: Any
    _metrics: Any

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.reference_logprobs: dict[str, torch.Tensor] = {}
        """Of the batches that are looked at again and again, by their digest."""
        super().__init__(*arguments, **settings)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """TRL's hook for rendering and tokenizing: the dataset holds the tokens already."""
        return dataset

    @property
    def mode(self) -> str:
        """As TRL names its metrics."""
        return "train" if self.model.training else "eval"

    def with_anchors(self, computed: Any, anchors: Mapping[str, Any] | None, model: Any) -> Any:
        """A computed loss, or a loss and outputs, plus the weighted NLL of the anchors.

        Of an answer, not of a token: whether to answer or to call a tool is one token of a short answer, and a mean
        over tokens would leave it to the long ones.
        """
        if anchors is None or not self.anchor_weight:
            return computed
        # Not the model as it is spread over processes, whose every forward waits for theirs: they may have no anchors.
        logprobs, spoken = token_logprobs(self.accelerator.unwrap_model(model), anchors)
        nll = -(logprobs * spoken).sum(1).mean()
        self._metrics[self.mode]["nll/anchors"].append(nll.item())
        loss, *outputs = computed if isinstance(computed, tuple) else (computed,)
        loss = loss + self.anchor_weight * nll
        return (loss, *outputs) if outputs else loss

    def note_kl(self, model: Any, batch: Mapping[str, Any], rows: Any = slice(None)) -> None:
        """Estimate KL(reference | policy) in nats a token from the answers of some sequences of a batch.

        The answers were sampled from the reference, so r - 1 - log r with r = policy / reference is unbiased
        and never negative (Schulman 2020, "k3"), but for what their selection adds.
        """
        policy, spoken = token_logprobs(self.accelerator.unwrap_model(model), batch)
        log_ratio = ((policy - self.reference_of_batch(batch)) * spoken)[rows].clamp(max=MAX_LOG_RATIO)
        kl = (log_ratio.exp() - 1 - log_ratio).sum() / spoken[rows].sum().clamp(min=1)
        self._metrics["eval"]["kl_to_reference"].append(kl.item())

    def reference_of_batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The reference's logprobs [num_sequences, length - 1], kept from look to look."""
        digest = hashlib.sha256()
        for name in sorted(batch.keys() - _NOT_SHOWN):
            digest.update(batch[name].detach().float().cpu().numpy().tobytes())
        key = digest.hexdigest()
        if key not in self.reference_logprobs:
            with reference_of(self):
                self.reference_logprobs[key] = token_logprobs(self.model, batch)[0]
        return self.reference_logprobs[key]


def token_logprobs(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs [num_sequences, length - 1] and which of them are of an answer, by the forward that TRL uses."""
    shown = {k: v for k, v in batch.items() if k not in _NOT_SHOWN and not k.startswith("KL_")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logprobs = model(**shown, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    spoken = batch["completion_mask"][:, 1:]
    return logprobs[:, -spoken.size(1) :], spoken


def keep_reference(model: Any) -> None:
    """Keep a frozen copy of a continued adapter as `ref`, as TRL's trainers of preferences do by themselves."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@contextmanager
def reference_of(trainer: Any) -> Iterator[None]:
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
        if rank() or not logs or "loss" not in logs:
            return
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "num_steps": state.max_steps, **numbers}) + "\n")
        self._tell("training", state.global_step, state.max_steps)
