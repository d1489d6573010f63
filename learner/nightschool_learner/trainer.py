"""One training run as a process: `python -m nightschool_learner.trainer RUN_FOLDER/manifest.json`.

Reads the manifest, tunes a LoRA adapter on the preference pairs with TRL's DPOTrainer (loss
`sigmoid` + nll_weight * `sft`), publishes it as PEFT safetensors and writes result.json last. A run that was
killed goes on from its last whole checkpoint and ends at the same step with the same weights (float32, CPU).

Owns the run; the model is `trainer_model.py`, tokens and batches are `trainer_data.py`, starting, watching
and stopping the process is `train.py`. Torch and TRL are imported inside functions, after nice and threads are set.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightschool_learner.alarms import end_metrics, find_alarms
from nightschool_learner.errors import LearnerError, StageFailedError
from nightschool_learner.manifest import Manifest, Phase, Result, RunFolder, TrainerProgress, write_whole
from nightschool_learner.niceness import be_nice

if TYPE_CHECKING:
    from nightschool_learner.trainer_model import Student

logger = logging.getLogger(__name__)

PARENT_POLL_S = 0.5
LOCK_WAIT_S = 3.0
"""How long a start waits for a dying predecessor to let go of the folder."""


@dataclass
class Run:
    """One run in progress: its manifest, its files, its data's size and the wall time of its phases."""

    manifest: Manifest
    folder: RunFolder
    num_pairs: int = 0
    num_dropped: int = 0
    num_anchors: int = 0
    length_ratio: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self, phase: Phase, step: int = 0, num_steps: int = 0) -> None:
        """Replace the progress file."""
        write_whole(
            self.folder.progress, TrainerProgress(phase=phase, step=step, num_steps=num_steps).model_dump_json()
        )

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Tell the phase and add up its wall time."""
        self.tell(phase)
        start = time.monotonic()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - start, 3)


def main(arguments: list[str]) -> int:
    """Train what the manifest says. Exit codes: 0 done, 2 it cannot be done, anything else a fault."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if len(arguments) != 1:
        logger.error("usage: python -m nightschool_learner.trainer RUN_FOLDER/manifest.json")
        return 2
    folder = RunFolder(Path(arguments[0]).resolve().parent)
    manifest = folder.read_manifest()
    _be_quiet(manifest)
    _die_with_parent(os.getppid())
    with _lock(folder):
        if folder.read_result() is not None:
            return 0
        try:
            train(Run(manifest, folder))
        except LearnerError as error:
            logger.error("%s", error)
            return 2
    return 0


def train(run: Run) -> Result:
    """Train, publish and write the result. Raises StageFailedError where it cannot be done here."""
    with run.timed("loading"):
        _import_silently()
        from nightschool_learner.trainer_device import told_of_its_share
    with told_of_its_share(run.manifest.placing):
        return _train(run)


def _train(run: Run) -> Result:
    with run.timed("loading"):
        from nightschool_learner.trainer_device import place_trainer
        from nightschool_learner.trainer_model import load_student

        student = load_student(run.manifest, place_trainer(run.manifest.placing))
    with run.timed("preparing"):
        trainer = _prepare(run, student)
        checkpoint = last_whole_checkpoint(run.folder.checkpoints)
        run.folder.keep_metrics_until(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    with run.timed("training"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with run.timed("publishing"):
        probe = _probe(run, student, trainer.model)
        result = _result(run, student, trainer.state.global_step, probe)
        publish(trainer.model, run.folder.adapter, _provenance(run, result))
    result = result.model_copy(update={"seconds": dict(run.seconds)})
    write_whole(run.folder.result, result.model_dump_json(indent=1))
    run.tell("done", result.num_steps, result.num_steps)
    return result


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


def _prepare(run: Run, student: Student) -> Any:
    """The trainer over the encoded pairs; notes in `run` how many there are and how long they are."""
    import datasets

    from nightschool_learner.trainer_data import PairCollator, encode_anchor, encode_pair, read_rows
    from nightschool_learner.trainer_dpo import MetricsWriter, make_trainer

    manifest = run.manifest
    tokenizer, limit = student.loaded.tokenizer, manifest.hyperparameters.max_length
    limit = min(limit, student.loaded.info.context_length)
    eos_id = tokenizer.eos_token_id
    rows = read_rows(manifest.pairs_file, manifest.pairs_sha256)
    encoded = [encode_pair(student.renderer, row, manifest.blobs, eos_id) for row in rows]
    kept = [pair for pair in encoded if pair.num_tokens <= limit]
    anchors = []
    if manifest.anchors_file is not None and manifest.hyperparameters.anchor_weight:
        anchor_rows = read_rows(manifest.anchors_file, manifest.anchors_sha256)
        anchors = [encode_anchor(student.renderer, row, manifest.blobs, eos_id) for row in anchor_rows]
        anchors = [anchor for anchor in anchors if anchor.num_tokens <= limit]
    if not kept:
        raise StageFailedError(
            f"none of {len(rows)} pairs fits {limit} tokens, the smaller of learner.train.max_length and the context"
        )
    pad_id = eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collator = PairCollator.of(kept, student.renderer, pad_id, student.loaded.parts.model, anchors)
    dataset = datasets.Dataset.from_dict(collator.dataset_rows())
    run.num_pairs, run.num_dropped, run.num_anchors = len(kept), len(rows) - len(kept), len(anchors)
    run.length_ratio = sum(len(p.chosen_ids) for p in kept) / max(1, sum(len(p.rejected_ids) for p in kept))
    return make_trainer(student, dataset, collator, manifest, MetricsWriter(run.folder.metrics, run.tell))


def _probe(run: Run, student: Student, model: Any) -> dict[str, Any]:
    """Logprobs of the probes' continuations under the trained model, for the server's proof of effect."""
    from nightschool_learner.trainer_data import score_text

    prompts = [probe.model_dump(mode="json") for probe in run.manifest.probes]
    return {
        "prompts": prompts,
        "logprobs": [score_text(model, student.renderer, probe) for probe in run.manifest.probes],
    }


def _result(run: Run, student: Student, num_steps: int, probe: Mapping[str, Any]) -> Result:
    """What the run came to."""
    import peft
    import torch
    import transformers
    import trl

    manifest, rows = run.manifest, run.folder.read_metrics()
    beta = manifest.hyperparameters.beta
    return Result(
        cycle_id=manifest.cycle_id,
        parent=manifest.parent,
        adapter_folder=run.folder.adapter,
        num_steps=num_steps,
        num_pairs=run.num_pairs,
        num_dropped=run.num_dropped,
        num_anchors=run.num_anchors,
        length_ratio=run.length_ratio,
        pairs_sha256=manifest.pairs_sha256,
        hyperparameters=manifest.hyperparameters,
        target_modules=student.target_modules,
        metrics=end_metrics(rows, beta),
        alarms=find_alarms(rows, beta, manifest.limits, run.length_ratio),
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
            "num_anchors": run.num_anchors,
        },
        "training": {
            "parent": manifest.parent,
            "seed": manifest.seed,
            "num_steps": result.num_steps,
            "hyperparameters": manifest.hyperparameters.model_dump(mode="json"),
            "metrics": dict(result.metrics),
            "alarms": [alarm.model_dump() for alarm in result.alarms],
            "versions": dict(result.versions),
        },
        "probe": result.probe if manifest.probes else None,
    }


def _be_quiet(manifest: Manifest) -> None:
    """Yield the processor to serving, before anything heavy is imported."""
    be_nice(manifest.nice)
    threads = str(manifest.num_threads)
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _import_silently() -> None:
    """Import what takes seconds, without progress bars in the log."""
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _die_with_parent(parent: int) -> None:
    """End this process within PARENT_POLL_S of the learner's end, however it ended. Portable, hence a thread."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(3)

    threading.Thread(target=watch, name="parent_watch", daemon=True).start()


@contextmanager
def _lock(folder: RunFolder) -> Iterator[None]:
    """Hold the run: two trainers never write one folder. The lock ends with the process."""
    deadline = time.monotonic() + LOCK_WAIT_S
    with folder.lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"another trainer holds {folder.path} for more than {LOCK_WAIT_S:g} s") from None
                time.sleep(0.05)
        yield


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
