"""Looks at the held-back rows while a run trains: numbers, alarms, the weights of the best, the end where it is time.

A look is one line of validation.jsonl; what follows from the lines is decided by the pure functions of `validation.py`
and `alarms.py`, so that a killed run goes on as if it had not been. Imports torch; used by the trainer process alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from nightschool_learner.alarms import find_alarms, look_alarms
from nightschool_learner.manifest import Look, Manifest, RunFolder
from nightschool_learner.trainer_exact import reference_of, token_logprobs
from nightschool_learner.trainer_life import rank
from nightschool_learner.trainer_model import Student
from nightschool_learner.trainer_rows import Material
from nightschool_learner.validation import best_look, look_steps, reason_to_stop

NUM_ANSWERED = 4
"""Held-back prompts that are answered at each look, for the length of answers."""
MAX_ANSWER_TOKENS = 512
MIN_ROWS = 4
"""Logged steps before an alarm of theirs ends training."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Takes the looks of one run."""

    def __init__(self, manifest: Manifest, folder: RunFolder, material: Material, student: Student) -> None:
        self._manifest, self._folder, self._material = manifest, folder, material
        self._eos_ids = sorted(student.loaded.eos_ids)
        self._steps: frozenset[int] = frozenset()
        self._trainer: Any = None
        self._reference_length = 0

    @property
    def looks(self) -> tuple[Look, ...]:
        """So far, across kills."""
        return self._folder.read_looks()

    def follow(self, trainer: Any, *, from_start: bool) -> None:
        """Look at this trainer's run; `from_start` where no earlier process looked at the start."""
        self._trainer = trainer
        if self._material.held_pairs:
            trainer.args.eval_on_start = from_start

    def reason_to_stop(self) -> str:
        """Why training is to end now; empty where it goes on."""
        wanted, limits = self._manifest.hyperparameters, self._manifest.limits
        if self._material.held_pairs:
            return reason_to_stop(self.looks, wanted.patience, stops_on_alarm=limits.stops)
        rows = self._folder.read_metrics() if limits.stops else []
        alarms = find_alarms(rows, wanted.beta, limits) if len(rows) >= MIN_ROWS else ()
        return f"step {rows[-1]['step']:.0f}: {alarms[0].message}" if alarms else ""

    def is_over(self) -> bool:
        """Whether training is to end now, by rank 0's files, for all processes of the run."""
        told: list[Any] = [bool(rank() == 0 and self.reason_to_stop())]
        broadcast_object_list(told, from_process=0)
        return bool(told[0])

    def keep_best(self, model: Any) -> int:
        """Put the weights of the best look into the model; the step they are of, 0 where nobody looked.

        Where no look is better than the start, the last weights stay: the alarm `validation` says what they are.
        """
        looks = self.looks
        best = best_look(looks, sound_only=self._manifest.limits.stops)
        if best is None or best.step == 0:
            return looks[-1].step if looks else 0
        weights = load_file(self._weights(best.step))
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(weights[name])
        return best.step

    def forget(self) -> None:
        """Remove the weights of the looks."""
        shutil.rmtree(self._folder.looks, ignore_errors=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._material.held_pairs:
            self._steps = look_steps(state.max_steps, self._manifest.hyperparameters.num_looks)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = state.global_step in self._steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._manifest.limits.stops and not self._material.held_pairs and self.is_over():
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if rank() == 0:
            self._take_look(state.global_step, metrics)
        if self.is_over():
            control.should_training_stop = True

    def _take_look(self, step: int, metrics: Any) -> None:
        looks = [look for look in self.looks if look.step < step]
        look = self._look(step, metrics)
        if looks:
            look = look.model_copy(update={"alarms": self._alarms(look, looks[0])})
        with self._folder.validation.open("a", encoding="utf-8") as file:
            file.write(look.model_dump_json() + "\n")
        looks = [*looks, look]
        if look in (best_look(looks), best_look(looks, sound_only=True)) and look.step:
            self._folder.looks.mkdir(exist_ok=True)
            partial = self._weights(look.step).with_suffix(".partial")
            model = self._the_trainer.model
            save_file({name: p.detach().cpu().contiguous() for name, p in _trained(model)}, partial)
            partial.replace(self._weights(look.step))

    @property
    def _the_trainer(self) -> Any:
        assert self._trainer is not None, "follow() comes before training"
        return self._trainer

    def _look(self, step: int, metrics: Any) -> Look:
        margin, accuracy = self._preference()
        return Look(
            step=step,
            loss=metrics["eval_loss"],
            margin=margin,
            accuracy=accuracy if step else 0.5,
            anchor_nll=metrics.get("eval_nll/anchors", 0.0),
            kl=metrics["eval_kl_to_reference"],
            length_ratio=self._length_ratio() if step else 1.0,
            length_told=self._num_chosen_tokens() / self._reference_length if step else 1.0,
        )

    def _preference(self) -> tuple[float, float]:
        """Mean reward margin of the held-back pairs and the share of them ranked right, whatever the run optimises."""
        trainer, held = self._the_trainer, sorted(self._material.held_pairs)
        wanted = self._manifest.hyperparameters
        margins: list[float] = []
        for start in range(0, len(held), wanted.batch_size):
            batch = self._material.collator([{"row": i} for i in held[start : start + wanted.batch_size]])
            batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            with torch.no_grad():
                policy, spoken = token_logprobs(trainer.model, batch)
                log_ratios = ((policy - trainer.reference_of_batch(batch)) * spoken).sum(1)
            chosen, rejected = log_ratios.chunk(2)
            margins += (wanted.beta * (chosen - rejected)).tolist()
        return sum(margins) / len(margins), sum(margin > 0 for margin in margins) / len(margins)

    def _alarms(self, look: Look, start: Look) -> Any:
        wanted, limits = self._manifest.hyperparameters, self._manifest.limits
        rows = self._folder.read_metrics()
        return find_alarms(rows, wanted.beta, limits) + look_alarms(look, start, limits)

    def _length_ratio(self) -> float:
        """Tokens of the model's greedy answers to held-back prompts, over those of the reference's."""
        if not self._reference_length:
            with reference_of(self._the_trainer):
                self._reference_length = self._num_answer_tokens()
        return self._num_answer_tokens() / self._reference_length

    def _num_chosen_tokens(self) -> float:
        """Tokens of the chosen answers to the prompts that are answered."""
        held = [self._material.pairs[i] for i in sorted(self._material.held_pairs)]
        chosen = {tuple(pair.prompt_ids): len(pair.chosen_ids) for pair in held}
        return sum(list(chosen.values())[:NUM_ANSWERED])

    def _num_answer_tokens(self) -> int:
        model = self._the_trainer.accelerator.unwrap_model(self._the_trainer.model)
        held = sorted(self._material.held_pairs)
        pairs = [self._material.pairs[i] for i in held]
        longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
        total = 0
        for batch in self._material.collator.prompts(held)[:NUM_ANSWERED]:
            shown = {key: value.to(model.device) for key, value in batch.items()}
            with torch.no_grad():
                answer = model.generate(
                    **shown,
                    do_sample=False,
                    max_new_tokens=min(MAX_ANSWER_TOKENS, 4 * longest),
                    eos_token_id=self._eos_ids,
                    pad_token_id=self._material.collator.pad_id,
                )
            total += answer.shape[1] - batch["input_ids"].shape[1]
        return total

    def _weights(self, step: int) -> Path:
        return self._folder.looks / f"step-{step}.safetensors"


def _trained(model: Any) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The adapter's weights; the reference's frozen copy is not among them."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".default." in name]
