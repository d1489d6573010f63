"""What the learner tells a trainer and what the trainer answers: the files of one training run.

    train/manifest.json   what to train (written once by the train stage, never changed)
    train/progress.json   phase and step, replaced as a whole
    train/metrics.jsonl   one line for each logged step
    train/validation.jsonl  one line for each look at the held-back rows
    train/looks/          the weights of the best looks, until the run is complete
    train/checkpoints/    of the trainer's own, resumable
    train/adapter/        the published adapter: adapter_config.json, adapter_model.safetensors
    train/result.json     written last: a run that has it is complete
    train/trainer.log     stdout and stderr of the child

Owns their types and their reading and writing. Light: no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

AlarmName = Literal[
    "chosen_fall", "drift", "length", "not_finite", "saturation", "kl", "anchor_fall", "length_drift", "validation"
]
Phase = Literal["starting", "loading", "preparing", "training", "publishing", "done"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Hyperparameters(_Frozen):
    """How a preference-tuning run goes: a loss of pairs plus an NLL term on the chosen answer."""

    rank: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()
    """Last names of the text tower's linear layers to adapt; empty adapts all but the head."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of all steps."""
    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs of one forward; a pair is two sequences."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Forwards of one optimizer step."""
    method: Literal["dpo", "sft", "kto"] = "dpo"
    """Pairs; good answers alone; good and bad answers."""
    loss: str = "sigmoid"
    """Of a pair, by TRL's name."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    beta: Annotated[float, Field(gt=0)] = 0.1
    nll_weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the mean NLL per chosen token beside the DPO loss (Iterative RPO, arXiv 2404.19733)."""
    anchor_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean NLL of an anchor's answer, see `anchors.py`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=16)] = 10_240
    """Tokens of prompt and answer; a longer pair is dropped and counted, never cut."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """`auto`: on a GPU."""
    quantize: Literal["none", "nf4"] = "none"
    """Of the base model while it is trained on; it is served as it is."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Of pairs and anchors that are held back to look at, see `validation.py`."""
    num_looks: Annotated[int, Field(ge=1)] = 4
    """Beside the one at the start, spread over the run; the last one is at its end."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Looks in a row without a better one after which training ends; 0 goes on to the end."""


class AlarmLimits(_Frozen):
    """When the logged metrics are worth an alarm; see `alarms.py`."""

    max_chosen_fall: Annotated[float, Field(ge=0)] = 2.0
    """Nats a chosen answer may lose against the reference, mean over the last quarter of the steps."""
    max_drift: Annotated[float, Field(gt=0)] = 200.0
    """Nats between policy and reference on an answer, chosen or rejected, in the last quarter."""
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Tokens of chosen over tokens of rejected answers: more of it teaches length."""
    max_margin: Annotated[float, Field(gt=0)] = 8.0
    """Mean reward margin, nats times beta: beyond it the pairs teach nothing more."""
    max_kl: Annotated[float, Field(gt=0)] = 0.5
    """Nats a token between policy and reference on held-back answers."""
    max_anchor_fall: Annotated[float, Field(gt=0)] = 0.5
    """Nats that a held-back anchor's answer may lose."""
    max_length_drift: Annotated[float, Field(gt=1)] = 1.5
    """How many times as long, or as short, greedy answers to held-back prompts may become."""
    stops: bool = False
    """Whether an alarm ends training, rather than being recorded."""


class Placing(_Frozen):
    """What decides where the trainer runs; see `nightschool_server/placement.py`."""

    placement: Literal["auto", "separate", "split", "sleep", "remote"] = "auto"
    device: str = ""
    memory_fraction: float = 0.0
    engine_device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine_memory_fraction: float = 0.9


class ProbePrompt(_Frozen):
    """A text-only prompt and an answer whose logprobs the trained model records."""

    messages: str
    """`chat.messages_to_json`."""
    tools: tuple[Mapping[str, Any], ...]
    """`{"name", "description", "parameters", "strict"}` each, `parameters` a JSON Schema as canonical text; no `strict`
    is False."""
    continuation: str


class Manifest(_Frozen):
    """One training run. Everything that the result depends on is in here, or named by digest."""

    cycle_id: str
    base_model: str
    """Folder or hub id of the served base model."""
    base_digest: str = ""
    """Of the model that the server serves; empty is not checked."""
    parent: str
    """Name of the adapter to continue; `base` starts a fresh one."""
    parent_folder: Path | None
    pairs_file: Path
    """TRL's conversational preference format, see `pair_export.py`."""
    pairs_sha256: str
    anchors_file: Path | None = None
    """The same format without a rejected answer; None: the run has no anchors."""
    anchors_sha256: str = ""
    corrections_file: Path | None = None
    """What callers would have answered, see `feedback_rows.py`; None: it is not learned from."""
    corrections_sha256: str = ""
    thumbs_file: Path | None = None
    """Answers that callers called good or bad; None: they are not learned from."""
    thumbs_sha256: str = ""
    blobs: Path
    """The home's blob folder, for images."""
    output: Path
    """The folder of this run."""
    hyperparameters: Hyperparameters
    limits: AlarmLimits = AlarmLimits()
    seed: int
    placing: Placing = Placing()
    nice: Annotated[int, Field(ge=0, le=19)] = 19
    num_threads: Annotated[int, Field(ge=1)] = 1
    num_processes: Annotated[int, Field(ge=1)] = 1
    """Side by side, one GPU each; a batch is as many times as large."""
    probes: tuple[ProbePrompt, ...] = ()


class Alarm(_Frozen):
    """One metric that left its bounds."""

    name: AlarmName
    value: float
    limit: float
    message: str


class Look(_Frozen):
    """What the held-back rows said at one step."""

    step: int
    loss: float
    """The run's own objective on them."""
    margin: float
    """Mean reward margin of the pairs, nats times beta."""
    accuracy: float
    """Share of pairs ranked right against the reference; 0.5 at the start, where nothing differs."""
    anchor_nll: float
    """Mean NLL of an anchor's answer, nats; 0 without anchors."""
    kl: float
    """Nats a token between policy and reference on the anchors' answers, or the chosen ones where there are none."""
    length_ratio: float
    """Tokens of greedy answers to held-back prompts over those that the reference gives."""
    length_told: float = 1.0
    """The same of the chosen answers: how long the pairs say that answers should be."""
    alarms: tuple[Alarm, ...] = ()


class Result(_Frozen):
    """What a run came to."""

    cycle_id: str
    parent: str
    adapter_folder: Path
    num_steps: int
    num_pairs: int
    num_dropped: int
    """Pairs longer than `max_length`."""
    num_anchors: int = 0
    num_held_back: int = 0
    """Pairs that were looked at and not trained on; they count in `num_pairs`, too."""
    num_told: int = 0
    """Corrections and thumbs that were trained on."""
    kept_step: int = 0
    """The step whose weights are published; the last one where there was no look."""
    looks: tuple[Look, ...] = ()
    stopped: str = ""
    """Why training ended before its last step; empty where it did not."""
    length_ratio: float
    """Tokens of chosen over tokens of rejected answers."""
    pairs_sha256: str
    hyperparameters: Hyperparameters
    target_modules: str
    """The pattern of adapted layers."""
    metrics: Mapping[str, float]
    """Means over the last quarter of the logged steps, up to the kept one."""
    alarms: tuple[Alarm, ...]
    probe: Mapping[str, Any]
    """`{"prompts": [ProbePrompt...], "logprobs": [[...], ...]}`, taken with the published weights."""
    seconds: Mapping[str, float]
    """Wall time of each phase of the last start."""
    versions: Mapping[str, str]


class TrainerProgress(_Frozen):
    """Where a run is."""

    phase: Phase
    step: int = 0
    num_steps: int = 0


class RunFolder:
    """The files of one run, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "manifest.json"
        self.progress = path / "progress.json"
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.looks = path / "looks"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.result = path / "result.json"
        self.log = path / "trainer.log"
        self.lock = path / "lock"
        self.child = path / "child.json"

    def read_manifest(self) -> Manifest:
        """The manifest. Raises pydantic's ValidationError where it is not one."""
        return Manifest.model_validate_json(self.manifest.read_bytes())

    def read_result(self) -> Result | None:
        """The result of a complete run, else None."""
        return Result.model_validate_json(self.result.read_bytes()) if self.result.exists() else None

    def read_progress(self) -> TrainerProgress:
        """Where the run is; the very beginning while nothing is written."""
        if not self.progress.exists():
            return TrainerProgress(phase="starting")
        return TrainerProgress.model_validate_json(self.progress.read_bytes())

    def read_metrics(self) -> list[dict[str, float]]:
        """Every complete line of metrics; a line that a crash cut short is left out."""
        return _read_lines(self.metrics)

    def read_looks(self) -> tuple[Look, ...]:
        """Every look so far, in the order of their steps."""
        return tuple(Look.model_validate(row) for row in _read_lines(self.validation))

    def keep_until(self, step: int) -> None:
        """Drop metrics and looks after `step`, which a resumed run writes again."""
        for path in (self.metrics, self.validation):
            rows = [row for row in _read_lines(path) if row["step"] <= step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def last_quarter(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The rows that say where a run ended up: the last quarter, at least one."""
    return rows[-max(1, len(rows) // 4) :]
