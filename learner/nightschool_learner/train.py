"""The train stage: from the cycle's pairs to a candidate in the registry.

Writes the manifest once, keeps one trainer process running until the run is complete (`trainer_process.py`), passes
its steps on as progress, draws its curves, and has the server take the adapter in under the cycle's id, so that a
cycle never has two. Everything heavy is in the trainer process; nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightschool_server.chat import ToolSpec, messages_from_json
from nightschool_server.engine import BASE
from nightschool_server.home import CORRECTIONS_FILE, THUMBS_FILE
from nightschool_server.store.store import Store

from nightschool_learner import records
from nightschool_learner.elsewhere import Device, adapter_from_elsewhere, alarms_of, lent_device
from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import (
    Alarm,
    AlarmLimits,
    Manifest,
    Placing,
    ProbePrompt,
    Result,
    RunFolder,
    write_whole,
)
from nightschool_learner.pair_export import ANCHORS_FILE, PAIRS_FILE
from nightschool_learner.plots import plot_training
from nightschool_learner.profiles import hyperparameters
from nightschool_learner.sampling import patiently
from nightschool_learner.stages import Cycle, Ending, Progress
from nightschool_learner.trainer_process import end_stale_trainer, last_words, start_trainer

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""How often the trainer's progress file is read."""

CANNOT = 2
"""Exit code of a trainer that says why it cannot go on; starting it again would not help."""


class TrainStage:
    """Trains one adapter."""

    name = "train"

    async def run(self, cycle: Cycle) -> Ending | None:
        if records.candidate_of(cycle.store, cycle.id) is not None:
            return None
        folder = RunFolder(cycle.folder / "train")
        folder.path.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(end_stale_trainer, folder)
        if not folder.manifest.exists():
            status = await patiently(cycle, cycle.client.admin.status)
            manifest = make_manifest(cycle, folder.path, status.base_model, status.base_model_digest)
            write_whole(folder.manifest, manifest.model_dump_json(indent=1))
        progress = cycle.progress(self.name)
        if cycle.config.train.placement == "remote":
            return await _train_elsewhere(cycle, folder, progress)
        result = folder.read_result() or await _train(cycle, folder, progress)
        progress.begin(result.num_steps, result.num_steps, _counts(result))
        await asyncio.to_thread(plot_training, folder.read_metrics(), result, cycle.folder / "plots")
        if result.stopped:
            logger.info("event=training_stopped cycle=%s reason=%s", cycle.id, result.stopped)
        for alarm in result.alarms:
            logger.warning("event=training_alarm cycle=%s alarm=%s message=%s", cycle.id, alarm.name, alarm.message)
        if ending := _ending_of(result.alarms, cycle):
            return ending
        await _register(cycle, result, progress)
        return None


def make_manifest(cycle: Cycle, folder: Path, base_model: str, base_digest: str) -> Manifest:
    """What the trainer is to do for this cycle; the same for every call of one cycle."""
    pairs = cycle.folder / PAIRS_FILE
    config = cycle.config.train
    return Manifest(
        cycle_id=cycle.id,
        base_model=base_model,
        base_digest=base_digest,
        parent=cycle.incumbent,
        parent_folder=None if cycle.incumbent == BASE else cycle.home.adapters / cycle.incumbent,
        pairs_file=pairs,
        pairs_sha256=hashlib.sha256(pairs.read_bytes()).hexdigest(),
        **_file("anchors", cycle.folder / ANCHORS_FILE),
        **(_file("corrections", cycle.folder / CORRECTIONS_FILE) if config.use_feedback else {}),
        **(_file("thumbs", cycle.folder / THUMBS_FILE) if config.use_feedback else {}),
        blobs=cycle.home.blobs,
        output=folder,
        hyperparameters=hyperparameters(config),
        limits=AlarmLimits(
            max_chosen_fall=config.max_chosen_fall,
            max_drift=config.max_drift,
            max_length_ratio=config.max_length_ratio,
            max_margin=config.max_margin,
            max_kl=config.max_kl,
            max_anchor_fall=config.max_anchor_fall,
            max_length_drift=config.max_length_drift,
            stops=config.on_alarm == "stop",
        ),
        seed=cycle.seed % 2**32,
        placing=Placing(
            placement=config.placement,
            device=config.device,
            memory_fraction=config.memory_fraction,
            engine_device=cycle.engine.device,
            engine_memory_fraction=cycle.engine.memory_fraction,
        ),
        nice=config.nice,
        num_threads=config.num_threads,
        num_processes=config.num_processes,
        probes=choose_probes(cycle.store, cycle.id, cycle.tools, config.num_probes),
    )


def _file(name: str, path: Path) -> dict[str, Any]:
    """A file of rows as the manifest names it; nothing where the cycle has none."""
    if not path.exists():
        return {}
    return {f"{name}_file": path, f"{name}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def choose_probes(store: Store, cycle_id: str, tools: Sequence[ToolSpec], num_probes: int) -> tuple[ProbePrompt, ...]:
    """Text-only prompts of the cycle's pairs with their chosen answers, spread over them."""
    rows = store.query(
        "SELECT s.history, c.text FROM pairs p JOIN steps s ON s.id = p.step_id JOIN candidates c ON c.id = p.chosen "
        "JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id "
        "WHERE p.cycle_id = ? GROUP BY s.id ORDER BY t.slot, s.position",
        (cycle_id,),
    )
    plain = [row for row in rows if not any(message.images for message in messages_from_json(row["history"]))]
    specs = tuple(asdict(tool) for tool in tools)
    step = max(1, len(plain) // max(1, num_probes))
    return tuple(
        ProbePrompt(messages=row["history"], tools=specs, continuation=row["text"])
        for row in plain[::step][:num_probes]
    )


async def _train_elsewhere(cycle: Cycle, folder: RunFolder, progress: Progress) -> Ending | None:
    name = await adapter_from_elsewhere(cycle, folder, progress)
    if ending := _ending_of(alarms_of(cycle, name), cycle):
        return ending
    records.set_candidate(cycle.store, cycle.id, name)
    progress.say(f"candidate {name}")
    return None


def _ending_of(alarms: Sequence[Alarm], cycle: Cycle) -> Ending | None:
    """What the alarms make of the cycle: a run that did not help its held-back rows is never evaluated."""
    for alarm in alarms:
        if alarm.name == "validation":
            return Ending("rejected", f"training did not help what it held back: {alarm.message}")
    if not alarms or cycle.config.train.on_alarm != "reject":
        return None
    said = "; ".join(alarm.message for alarm in alarms)
    return Ending("rejected", f"training raised an alarm and learner.train.on_alarm is 'reject': {said}")


async def _train(cycle: Cycle, folder: RunFolder, progress: Progress) -> Result:
    """Run trainers until the run is complete; one that was killed goes on from its checkpoint."""
    for attempt in range(cycle.config.train.max_restarts + 1):
        async with lent_device(cycle, progress) as device:
            code = await _run_trainer(cycle, folder, progress, device)
        result = folder.read_result()
        if result is not None:
            return result
        logger.warning("event=trainer_ended cycle=%s attempt=%d exit_code=%d", cycle.id, attempt, code)
        if code >= 0:
            break
    raise StageFailedError(
        f"the trainer ended with {'signal' if code < 0 else 'exit code'} {abs(code)} and no result: "
        f"{last_words(folder)} (log: {folder.log})"
    )


async def _run_trainer(cycle: Cycle, folder: RunFolder, progress: Progress, device: Device) -> int:
    """One trainer from start to end, its progress passed on. A cancelled cycle ends it, a paused learner holds it."""
    cycle.check()
    child = await start_trainer(folder)
    ended, held = asyncio.create_task(child.wait()), False
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=POLL_S)
            _show(folder, progress)
            cycle.check()
            device.check()
            if held == cycle.resumed.is_set():
                held = not held
                (child.hold if held else child.go_on)()
        return ended.result()
    finally:
        await child.stop()
        await ended


def _show(folder: RunFolder, progress: Progress) -> None:
    with contextlib.suppress(ValueError):
        now = folder.read_progress()
        progress.num_done, progress.num_total = now.step, now.num_steps
        progress.say(f"{now.phase}: step {now.step} of {now.num_steps}" if now.num_steps else now.phase)


def _counts(result: Result) -> dict[str, int]:
    return {
        "pairs": result.num_pairs,
        "anchors": result.num_anchors,
        "held_back": result.num_held_back,
        "told": result.num_told,
        "kept_step": result.kept_step,
        "dropped_too_long": result.num_dropped,
        "alarms": len(result.alarms),
    }


async def _register(cycle: Cycle, result: Result, progress: Progress) -> None:
    """Have the server take the adapter in; the cycle's id makes a repeat find the same one."""
    progress.say("importing")
    adapter = await patiently(
        cycle,
        lambda: cycle.client.admin.adapters.import_(
            str(result.adapter_folder),
            parent=result.parent,
            reason=f"trained in cycle {cycle.id} on {result.num_pairs} pairs in {result.num_steps} steps",
            request_id=f"import-{cycle.id}",
        ),
    )
    records.set_candidate(cycle.store, cycle.id, adapter.name)
    progress.say(f"candidate {adapter.name}")
    logger.info("event=candidate_registered cycle=%s adapter=%s", cycle.id, adapter.name)
