"""Two cycles of one seed on copies of one home: what is the same in both, whatever runs beside what."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from nightschool import AsyncClient
from nightschool_learner.explore import CritiqueStage, ExploreStage
from nightschool_learner.pairs import PairsStage
from nightschool_learner.prompts import WrittenTask, write_task
from nightschool_learner.sampling import AnswerSampler, PracticeSampler, Sample, Samples
from nightschool_learner.seeds import SeedsStage
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesize import SynthesizeStage
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import canonical_json, messages_to_json
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.store.store import Store

from tests.harness import Running
from tests.learner.practice_home import FakeCritic, cycle_on, log_request, open_home

ROWS = {
    "tasks": "SELECT slot, prompt, state, images FROM tasks ORDER BY slot",
    "rollouts": "SELECT t.slot, r.outcome, r.answer FROM rollouts r JOIN tasks t ON t.id = r.task_id ORDER BY t.slot",
    "steps": "SELECT t.slot, s.position, s.history, s.picked, s.picked_by, s.abstention, s.num_tokens, s.num_calls "
    "FROM steps s JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id ORDER BY 1, 2",
    "candidates": "SELECT t.slot, s.position AS step, c.position, c.text, c.token_ids, c.num_samples, c.observation, "
    "c.failure FROM candidates c JOIN steps s ON s.id = c.step_id JOIN rollouts r ON r.id = s.rollout_id "
    "JOIN tasks t ON t.id = r.task_id ORDER BY 1, 2, 3",
    "pairs": "SELECT p.kind, s.history, w.text AS chosen, l.text AS rejected FROM pairs p JOIN steps s "
    "ON s.id = p.step_id JOIN candidates w ON w.id = p.chosen JOIN candidates l ON l.id = p.rejected "
    "JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id "
    "ORDER BY t.slot, s.position, w.position, l.position",
}
"""What a cycle found, without names and times."""
PRICES = tuple(write_call("price", {"item": item}) for item in ("mug", "none"))
AT_A_STEP = (*PRICES, "12", "It is 12", "A mug?")
NAMES = ("id", "pair_id", "step_id", "task_id", "cycle_id")
"""Keys of the trainer's rows that name rows."""


@dataclass
class Drawing:
    """Answers as an engine that is exact would: from prompt and stream alone, after waits of the test's choosing."""

    waits: random.Random
    calls: list[int] = field(default_factory=list)

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        for _ in range(self.waits.randrange(6)):
            await asyncio.sleep(0)
        assert sampling.seed is not None
        self.calls.append(sampling.seed)
        answers = [self._said(prompt, sampling, sampling.seed + index) for index in range(sampling.n)]
        return Samples(tuple(Sample(a, tuple(a.encode()), (-0.1,) * len(a), (), "stop") for a in answers), 10)

    def _said(self, prompt: Prompt, sampling: Sampling, stream: int) -> str:
        of = canonical_json([messages_to_json(prompt.messages), stream, sampling.temperature])
        number = int.from_bytes(hashlib.sha256(of.encode()).digest()[:4], "big")
        if not prompt.tools:
            return write_task(WrittenTask(f"What does mug number {number} cost?", None))
        return AT_A_STEP[number % len(AT_A_STEP)]


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Store, Store]:
    """A home with requests, and a copy of it."""
    first = open_home(tmp_path / "first")
    for index in range(12):
        log_request(first, f"{index:02}", f"What does a mug cost for customer {index}?")
    first.close()
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    return open_home(tmp_path / "first"), open_home(tmp_path / "second")


def found(cycle: Cycle) -> dict[str, Any]:
    rows: dict[str, Any] = {name: cycle.store.query(sql) for name, sql in ROWS.items()}
    for name in ("pairs.jsonl", "anchors.jsonl"):
        lines = [json.loads(line) for line in (cycle.folder / name).read_text().splitlines()]
        rows[name] = [{key: value for key, value in line.items() if key not in NAMES} for line in lines]
    return rows


async def to_the_pairs(cycle: Cycle, sampler: AnswerSampler, explore: ExploreStage) -> dict[str, Any]:
    await SeedsStage().run(cycle)
    await SynthesizeStage(lambda _: sampler).run(cycle)
    await explore.run(cycle)
    await CritiqueStage().run(cycle)
    await PairsStage().run(cycle)
    return found(cycle)


async def drawn(store: Store, waits: int, concurrency: int) -> dict[str, Any]:
    sampler = Drawing(random.Random(waits))
    overrides = ("synthesize.num_tasks=12", "synthesize.min_tasks=1", "pairs.min_pairs=1", "pairs.max_per_step=2")
    cycle = cycle_on(store, *overrides, f"explore.concurrency={concurrency}", f"synthesize.concurrency={concurrency}")
    return await to_the_pairs(cycle, sampler, ExploreStage(lambda _: sampler, lambda *_: nullcontext(FakeCritic())))


async def test_a_cycle_that_is_run_again_from_its_seed_is_the_same_cycle(homes: tuple[Store, Store]) -> None:
    first, second = [await drawn(store, waits, n) for store, waits, n in zip(homes, (1, 2), (3, 12), strict=True)]
    assert len(first["pairs"]) > 10
    assert {row["kind"] for row in first["pairs"]} == {"both_ran", "ran_vs_failed"}
    for name, rows in first.items():
        assert rows == second[name], name


async def test_a_cycle_of_another_seed_is_another_cycle(homes: tuple[Store, Store]) -> None:
    first = await drawn(homes[0], 1, 3)
    cycle = cycle_on(homes[1], seed=8)
    assert cycle.seed == 8
    second = await drawn(homes[1], 1, 3)
    assert first["tasks"] != second["tasks"]
    assert first["candidates"] != second["candidates"]


@pytest.fixture
async def client(shop_server: Running) -> AsyncIterator[AsyncClient]:
    token = (shop_server.home / "cli.token").read_text().strip()
    async with AsyncClient(shop_server.address, token=token) as made:
        yield made


async def test_the_real_engine_samples_and_judges_a_cycle_again_alike(
    homes: tuple[Store, Store], client: AsyncClient
) -> None:
    overrides = (
        "synthesize.num_tasks=5", "synthesize.min_tasks=1", "synthesize.concurrency=1", "pairs.min_pairs=1",
        "pairs.max_share_failed=1", "critic.margin_nats=0.01", "explore.hot_temperature=4.0", "explore.top_p=1.0",
        "explore.max_tokens=24", "explore.max_steps=2",
    )  # fmt: skip
    both = []
    for store, concurrency in zip(homes, (2, 8), strict=True):
        cycle = replace(cycle_on(store, *overrides, f"explore.concurrency={concurrency}"), client=client)
        both.append(await to_the_pairs(cycle, PracticeSampler(cycle), ExploreStage()))
    first, second = both
    assert len(first["candidates"]) > len(first["steps"]), "there was something to choose"
    for name in ROWS:
        assert first[name] == second[name], name
