"""One training run as a process: `python -m nightschool_learner.trainer RUN_FOLDER/manifest.json`.

Reads the manifest, tunes a LoRA adapter on the preference pairs with TRL, publishes it as PEFT safetensors and writes
result.json last. A run that was killed goes on from its last whole checkpoint and ends at the same step with the same
weights (float32, CPU).

Owns the run; the model is `trainer_model.py`, tokens and batches are `trainer_data.py`, starting, watching
and stopping the process is `train.py`. Torch and TRL are imported inside functions, after nice and threads are set.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightschool_learner.alarms import end_metrics, find_alarms, look_alarms
from nightschool_learner.errors import LearnerError
from nightschool_learner.manifest import Manifest, Phase, Result, RunFolder, TrainerProgress, write_whole
from nightschool_learner.trainer_life import (
    be_quiet,
    die_with_parent,
    import_silently,
    is_launched,
    launch,
    lock,
    rank,
)
from nightschool_learner.validation import no_gain

if TYPE_CHECKING:
    from nightschool_learner.trainer_model import Student
    from nightschool_learner.trainer_watch import Watch

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run in progress: its manifest, its files, its data's size and the wall time of its phases."""

    manifest: Manifest
    folder: RunFolder
    num_pairs: int = 0
    num_dropped: int = 0
    num_anchors: int = 0
    num_held_back: int = 0
    num_told: int = 0
    length_ratio: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self, phase: Phase, step: int = 0, num_steps: int = 0) -> None:
        """Replace the progress file."""
        if rank() == 0:
            told = TrainerProgress(phase=phase, step=step, num_steps=num_steps)
            write_whole(self.folder.progress, told.model_dump_json())

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Tell the phase and add up its wall time."""
        self.tell(phase)
        start = time.monotonic()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - start, 3)


@dataclass(frozen=True)
class Kept:
    """The weights that are published."""

    step: int
    """0: those of the last step, nobody looked at others."""
    stopped: str
    """Why training is to end early; empty where it is not."""


def main(arguments: list[str]) -> int:
    """Train what the manifest says. Exit codes: 0 done, 2 it cannot be done, anything else a fault."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if len(arguments) != 1:
        logger.error("usage: python -m nightschool_learner.trainer RUN_FOLDER/manifest.json")
        return 2
    folder = RunFolder(Path(arguments[0]).resolve().parent)
    manifest = folder.read_manifest()
    be_quiet(manifest)
    die_with_parent()
    with lock(folder):
        if folder.read_result() is not None:
            return 0
        try:
            if manifest.num_processes > 1 and not is_launched():
                launch(manifest, folder.manifest)
            train(Run(manifest, folder))
        except LearnerError as error:
            logger.error("%s", error)
            return 2
    return 0


def train(run: Run) -> None:
    """Train; rank 0 publishes and writes the result. Raises StageFailedError where it cannot be done here."""
    with run.timed("loading"):
        import_silently()
        from nightschool_learner.trainer_device import told_of_its_share
    with told_of_its_share(run.manifest.placing):
        _train(run)


def _train(run: Run) -> None:
    with run.timed("loading"):
        from nightschool_learner.trainer_device import place_trainer
        from nightschool_learner.trainer_model import load_student

        student = load_student(run.manifest, place_trainer(run.manifest.placing))
    with run.timed("preparing"):
        trainer, watch = _prepare(run, student)
        checkpoint = last_whole_checkpoint(run.folder.checkpoints)
        if rank() == 0:
            run.folder.keep_until(int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1)
        watch.follow(trainer, from_start=checkpoint is None)
    with run.timed("training"):
        if checkpoint is None or not watch.is_over():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if rank():
        return
    with run.timed("publishing"):
        kept = Kept(watch.keep_best(trainer.model), watch.reason_to_stop())
        probe = _probe(run, student, trainer.model)
        result = _result(run, student, kept, probe)
        publish(trainer.model, run.folder.adapter, _provenance(run, result))
    result = result.model_copy(update={"seconds": dict(run.seconds)})
    write_whole(run.folder.result, result.model_dump_json(indent=1))
    watch.forget()
    run.tell("done", result.num_steps, result.num_steps)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state file last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_json(path / "trainer_state.json")), None)


def publish(model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the adapter whole or not at all: PEFT's two files, and where it comes from for the registry."""
    import shutil

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), selected_adapters=["default"], safe_serialization=True)
    for path in partial.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_whole(partial / "provenance.json", json.dumps(dict(provenance), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _prepare(run: Run, student: Student) -> tuple[Any, Watch]:
    """The trainer over the encoded pairs and its watch; notes in `run` how many there are and how long they are."""
    from nightschool_learner.trainer_exact import MetricsWriter
    from nightschool_learner.trainer_methods import make_trainer
    from nightschool_learner.trainer_rows import read_material
    from nightschool_learner.trainer_watch import Watch

    material = read_material(run.manifest, student)
    run.num_pairs, run.num_dropped = len(material.pairs), material.num_dropped
    run.num_anchors, run.num_held_back = len(material.collator.anchors), len(material.held_pairs)
    run.num_told = material.num_told
    run.length_ratio = material.length_ratio()
    watch = Watch(run.manifest, run.folder, material, student)
    writer = MetricsWriter(run.folder.metrics, run.tell)
    return make_trainer(student, material, run.manifest, [writer, watch]), watch


def _probe(run: Run, student: Student, model: Any) -> dict[str, Any]:
    """Logprobs of the probes' continuations under the trained model, for the server's proof of effect."""
    from nightschool_learner.trainer_data import score_text
    from nightschool_learner.trainer_model import as_served

    if run.manifest.hyperparameters.quantize != "none":
        model = as_served(run.manifest, model, run.folder.path / "unquantized")
    prompts = [probe.model_dump(mode="json") for probe in run.manifest.probes]
    return {
        "prompts": prompts,
        "logprobs": [score_text(model, student.renderer, probe) for probe in run.manifest.probes],
    }


def _result(run: Run, student: Student, kept: Kept, probe: Mapping[str, Any]) -> Result:
    """What the run came to."""
    import peft
    import torch
    import transformers
    import trl

    manifest, logged, looks = run.manifest, run.folder.read_metrics(), run.folder.read_looks()
    beta, limits = manifest.hyperparameters.beta, manifest.limits
    rows = [row for row in logged if not kept.step or row["step"] <= kept.step]
    at_kept = [look for look in looks if look.step == kept.step]
    alarms = find_alarms(rows, beta, limits, run.length_ratio)
    alarms += tuple(alarm for look in at_kept for alarm in look_alarms(look, looks[0], limits))
    without_gain = no_gain(looks, sound_only=limits.stops)
    num_steps = len(logged)
    return Result(
        cycle_id=manifest.cycle_id,
        parent=manifest.parent,
        adapter_folder=run.folder.adapter,
        num_steps=num_steps,
        num_pairs=run.num_pairs,
        num_dropped=run.num_dropped,
        num_anchors=run.num_anchors,
        num_held_back=run.num_held_back,
        num_told=run.num_told,
        kept_step=kept.step or num_steps,
        looks=looks,
        stopped=kept.stopped if num_steps < logged[-1]["num_steps"] else "",
        length_ratio=run.length_ratio,
        pairs_sha256=manifest.pairs_sha256,
        hyperparameters=manifest.hyperparameters,
        target_modules=student.target_modules,
        metrics=end_metrics(rows, beta),
        alarms=(*alarms, without_gain) if without_gain else alarms,
        probe=probe,
        seconds=run.seconds,
        versions={module.__name__: str(module.__version__) for module in (torch, transformers, peft, trl)},
    )


def _provenance(run: Run, result: Result) -> dict[str, Any]:
    """What the registry keeps in the adapter's manifest, see `adapters/folder.py`."""
    manifest = run.manifest
    return {
        "cycle_id": manifest.cycle_id,
        "data": {
            "pairs_sha256": manifest.pairs_sha256,
            "num_pairs": run.num_pairs,
            "num_dropped": run.num_dropped,
            "anchors_sha256": manifest.anchors_sha256,
            "corrections_sha256": manifest.corrections_sha256,
            "thumbs_sha256": manifest.thumbs_sha256,
            "num_told": run.num_told,
            "num_anchors": run.num_anchors,
        },
        "training": {
            "parent": manifest.parent,
            "seed": manifest.seed,
            "num_steps": result.num_steps,
            "kept_step": result.kept_step,
            "num_held_back": result.num_held_back,
            "hyperparameters": manifest.hyperparameters.model_dump(mode="json"),
            "metrics": dict(result.metrics),
            "alarms": [alarm.model_dump() for alarm in result.alarms],
            "versions": dict(result.versions),
        },
        "probe": result.probe if manifest.probes else None,
    }


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
