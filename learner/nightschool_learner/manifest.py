"""What the learner tells a trainer and what the trainer answers: the files of one training run.

    train/manifest.json   what to train (written once by the train stage, never changed)
    train/progress.json   phase and step, replaced as a whole
    train/metrics.jsonl   one line for each logged step
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

AlarmName = Literal["chosen_fall", "drift", "length", "not_finite"]
Phase = Literal["starting", "loading", "preparing", "training", "publishing", "done"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hyperparameters(_Frozen):
    """How a preference-tuning run goes: DPO (sigmoid) plus an NLL term on the chosen answer."""

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
    beta: Annotated[float, Field(gt=0)] = 0.1
    nll_weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the mean NLL per chosen token beside the DPO loss (Iterative RPO, arXiv 2404.19733)."""
    anchor_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean NLL of an anchor's answer, see `anchors.py`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=16)] = 10_240
    """Tokens of prompt and answer; a longer pair is dropped and counted, never cut."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50


class AlarmLimits(_Frozen):
    """When the logged metrics are worth an alarm; see `alarms.py`."""

    max_chosen_fall: Annotated[float, Field(ge=0)] = 2.0
    """Nats a chosen answer may lose against the reference, mean over the last quarter of the steps."""
    max_drift: Annotated[float, Field(gt=0)] = 200.0
    """Nats between policy and reference on an answer, chosen or rejected, in the last quarter."""
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Tokens of chosen over tokens of rejected answers: more of it teaches length."""


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
    probes: tuple[ProbePrompt, ...] = ()


class Alarm(_Frozen):
    """One metric that left its bounds."""

    name: AlarmName
    value: float
    limit: float
    message: str


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
    length_ratio: float
    """Tokens of chosen over tokens of rejected answers."""
    pairs_sha256: str
    hyperparameters: Hyperparameters
    target_modules: str
    """The pattern of adapted layers."""
    metrics: Mapping[str, float]
    """Means over the last quarter of the logged steps."""
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
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


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
