"""A home with logged requests and a cycle on it, over the real store; fakes at the learner's two seams only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nightschool import AsyncClient
from nightschool_learner import records
from nightschool_learner.critique import Context, Verdict
from nightschool_learner.meter import CLOCKS
from nightschool_learner.prompts import CandidateView
from nightschool_learner.sampling import Sample, Samples
from nightschool_learner.stages import STAGE_NAMES, Cycle, Progress
from nightschool_server.chat import canonical_json, system, user
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.config.serving import AgentConfig, EngineConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.home import Home
from nightschool_server.store.request_rows import LoggedMessage, RequestRecord, insert_request
from nightschool_server.store.store import Store

from tests.learner.practice_app import app

__all__ = ["DiedError", "FakeCritic", "FakeSampler", "cycle_on", "dump", "log_request", "open_home", "without_clocks"]

Answer = Callable[[Prompt, Sampling, int], str]
"""What to answer as sample number i of a call."""


def open_home(path: Path) -> Store:
    """A store in a fresh home."""
    return Store.open(Home(path))


def log_request(store: Store, name: str, prompt: str, *, policy: str = "train", images: Sequence[str] = ()) -> str:
    """Log an answered task, as the server does."""
    turns = (system(app.system_prompt), user(prompt, images))
    record = RequestRecord(
        id=f"resp_{name}",
        method="task",
        caller="tester",
        adapter="base",
        policy=policy,  # type: ignore[arg-type]
        status="OK",
        created_at=time.time(),
        ended_at=time.time(),
        outcome="answered",
        messages=tuple(LoggedMessage(turn) for turn in turns) if policy != "no_log" else (),
    )
    with store.transaction() as db:
        insert_request(db, record)
    return record.id


def cycle_on(store: Store, *overrides: str, seed: int = 7) -> Cycle:
    """A running cycle as the loop would hand it to a stage; its client is never connected."""
    config = with_overrides(LearnerConfig(), overrides)
    row = records.open_cycle(store)
    if row is None:
        assert records.enqueue(store, "manual", "test") is not None
        row = records.open_cycle(store)
        assert row is not None
        row = records.start(store, row, seed=seed, incumbent="base", config=config.model_dump_json())
    progress = {name: Progress(name, partial(records.update_stage, store, row.id)) for name in STAGE_NAMES}
    resumed = asyncio.Event()
    resumed.set()
    cycle = Cycle(
        id=row.id,
        seed=row.seed,
        incumbent="base",
        config=config,
        engine=EngineConfig(),
        agent=AgentConfig(),
        home=store.home,
        store=store,
        app=app,
        app_ref="tests.learner.practice_app:app",
        tools=app.specs,
        client=AsyncClient("127.0.0.1:1", token="none"),
        progress=progress.__getitem__,
        cancelled=asyncio.Event(),
        resumed=resumed,
    )
    cycle.folder.mkdir(parents=True, exist_ok=True)
    return cycle


@dataclass
class FakeSampler:
    """Answers from a function; remembers every call, and can be told to die at one."""

    answer: Answer
    calls: list[tuple[Prompt, Sampling, str]] = field(default_factory=list)
    die_at: int | None = None

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        if self.die_at is not None and len(self.calls) >= self.die_at:
            raise DiedError
        self.calls.append((prompt, sampling, adapter))
        await asyncio.sleep(0)
        answers = [self.answer(prompt, sampling, index) for index in range(sampling.n)]
        return Samples(tuple(Sample(a, tuple(a.encode()), (-0.1,) * len(a), (), "stop") for a in answers), 10)


class DiedError(Exception):
    """Stands for kill -9 in the middle of a stage: nothing after it runs."""


@dataclass
class FakeCritic:
    """Prefers the longer action by a margin of its length; remembers every call, and can be told to die at one."""

    calls: list[tuple[Context, CandidateView, CandidateView]] = field(default_factory=list)
    die_at: int | None = None

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        if self.die_at is not None and len(self.calls) >= self.die_at:
            raise DiedError
        self.calls.append((context, first, second))
        margin = float(len(first.action) - len(second.action))
        return Verdict("first" if margin > 0 else "second", margin, "A" if margin > 0 else "B", 20)


def without_clocks(counts: Mapping[str, int]) -> dict[str, int]:
    """A stage's counts but for those that tell how long it took."""
    return {name: count for name, count in counts.items() if name not in CLOCKS}


def dump(store: Store, table: str) -> list[str]:
    """Every row of a table as text, to compare two moments."""
    return sorted(canonical_json({k: str(v) for k, v in row.items()}) for row in store.query(f"SELECT * FROM {table}"))
