"""A real server of the shop in this process, and a cycle on its home whose pairs are ready to be trained on."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nightschool import AsyncClient
from nightschool_learner import practice_records, records
from nightschool_learner.critique import Choice
from nightschool_learner.pair_export import write_pairs_file
from nightschool_learner.practice_records import CandidateRow, RolloutRow, StepRow
from nightschool_learner.seed_records import KEPT, insert_task, new_task
from nightschool_learner.stages import STAGE_NAMES, Cycle, Progress
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.app import App, load_app
from nightschool_server.chat import messages_to_json, system, user
from nightschool_server.config.config import Config, load_config
from nightschool_server.config.learner import with_overrides
from nightschool_server.home import Home
from nightschool_server.ids import new_id
from nightschool_server.serving import ServeOptions, StartEngine, serving
from nightschool_server.store.store import Store
from safetensors.torch import load_file, save

from tests.learner.training_data import MODEL, Trained

APP = "tests.learner.candidate_app:app"
SMALL_GATE = ("gate.min_n=4", "gate.min_difference=0", "gate.max_p=1", "evaluate.num_seeds=0")


@dataclass(frozen=True)
class World:
    """A server that serves, and a second connection to its store."""

    home: Home
    config: Config
    store: Store
    app: App
    client: AsyncClient

    def cycle(self, *overrides: str, incumbent: str | None = None, seed: int = 7) -> Cycle:
        """The open cycle, or a fresh one with these overrides."""
        row = records.open_cycle(self.store)
        if row is None:
            assert records.enqueue(self.store, "manual", "test") is not None
            row = records.open_cycle(self.store)
        assert row is not None
        config = with_overrides(self.config.learner, overrides)
        if row.state == "queued":
            active = incumbent or records.active_adapter(self.store)
            row = records.start(self.store, row, seed=seed, incumbent=active, config=config.model_dump_json())
        progress = {name: Progress(name, partial(records.update_stage, self.store, row.id)) for name in STAGE_NAMES}
        resumed = asyncio.Event()
        resumed.set()
        cycle = Cycle(
            id=row.id, seed=row.seed, incumbent=row.incumbent or "base", config=config,
            engine=self.config.engine, agent=self.config.agent, home=self.home,
            store=self.store, app=self.app, app_ref=APP, tools=self.app.specs, client=self.client,
            progress=progress.__getitem__, cancelled=asyncio.Event(), resumed=resumed,
        )  # fmt: skip
        cycle.folder.mkdir(parents=True, exist_ok=True)
        return cycle

    def progress(self, cycle: Cycle, stage: str) -> dict[str, Any]:
        """The stage's row."""
        found = self.store.one("SELECT * FROM stages WHERE cycle_id = ? AND name = ?", (cycle.id, stage))
        assert found is not None
        return found


@asynccontextmanager
async def world(path: Path, engine: StartEngine | None = None) -> AsyncIterator[World]:
    """A server on a fresh home, on the real engine where none is given."""
    home = Home(path).create()
    overrides = {"server.port": "0", "engine.model": str(MODEL), "agent.app": APP}
    config = load_config(home, {}, overrides)
    async with serving(home, config, ServeOptions(with_learner=False), engine) as server:
        store = Store.open(home, migrate=False)
        client = AsyncClient(server.address, token=home.cli_token.read_text().strip())
        try:
            yield World(home, config, store, load_app(APP), client)
        finally:
            await client.close()
            store.close()


def add_pairs(cycle: Cycle, num_pairs: int, *, seed: int = 1) -> None:
    """Write decided steps of subtraction tasks and their pairs, then the trainer's file."""
    rng = random.Random(seed)
    for slot in range(num_pairs):
        a, b = rng.randint(20, 90), rng.randint(2, 19)
        history = (system(cycle.app.system_prompt), user(f"What is left of {a} when {b} are gone?"))
        task = new_task(slot, history[1].text, (), KEPT)
        rollout = RolloutRow(new_id("roll"), task.id, "running")
        step = StepRow(new_id("step"), rollout.id, 0, messages_to_json(history), None, "")
        chosen, rejected = (
            CandidateRow(new_id("cand"), step.id, position, text, (), -1.0, 1, "", "", False)
            for position, text in enumerate(
                write_call("calculator", {"expression": f"{a} {sign} {b}"}) for sign in ("-", "+")
            )
        )
        with cycle.store.transaction() as db:
            insert_task(db, cycle.id, task, [], [])
            practice_records.start_rollout(db, cycle.id, rollout, cycle.incumbent)
            practice_records.insert_step(db, step, [chosen, rejected])
            practice_records.pick(db, step.id, Choice(0, "critic"))
            practice_records.end_rollout(db, rollout.id, "done", "answered", str(a - b))
            pair = (new_id("pair"), cycle.id, step.id, chosen.id, rejected.id, "both_ran", 2.0, time.time())
            practice_records.insert_pairs(db, [pair])
    write_pairs_file(cycle)


async def add_adapter(served: World, trained: Trained, *, scale: float = 1.0) -> str:
    """Import the trained adapter, its effect scaled so that it is another one. Returns its name."""
    files = {}
    source = trained.result.adapter_folder
    tensors = load_file(source / "adapter_model.safetensors")
    scaled = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    files["adapter_model.safetensors"] = save(scaled)
    files["adapter_config.json"] = (source / "adapter_config.json").read_bytes()
    return (await served.client.admin.adapters.import_(files=files, reason="test")).name


def fresh(cycle: Cycle, **changes: Any) -> Cycle:
    """The cycle as a restarted learner has it: events of its own."""
    resumed = asyncio.Event()
    resumed.set()
    return replace(cycle, cancelled=asyncio.Event(), resumed=resumed, **changes)
