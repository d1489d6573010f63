"""The stage seam: what one stage of a cycle is given, what it must keep, and how it ends a cycle.

A cycle runs `STAGE_NAMES` in this order. A stage is idempotent and resumable: every unit of its work
is a row with a UNIQUE key, written in one transaction when the unit is complete. `run` may be called
again after a kill -9 anywhere: it reads from the rows what is done and does the rest. A stage that
finds everything done returns at once.

Owns the protocol, the context and the progress rows' writing; the loop (`loop.py`) owns leases, order
and the end of a cycle. Stages never write `cycles.state`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from nightschool_learner.errors import CycleCancelledError

if TYPE_CHECKING:
    from nightschool import AsyncClient
    from nightschool_server.app import App
    from nightschool_server.chat import ToolSpec
    from nightschool_server.config.learner import LearnerConfig
    from nightschool_server.config.serving import AgentConfig, EngineConfig
    from nightschool_server.home import Home
    from nightschool_server.store.store import Store

STAGE_NAMES = ("seeds", "synthesize", "explore", "critique", "pairs", "train", "evaluate", "promote")
"""In the order in which they run. `explore` drives `critique`, step by step."""

MIN_UPDATE_S = 0.3
"""Progress rows are written at most this often."""

EndState = Literal["promoted", "rejected", "stopped"]


@dataclass(frozen=True)
class Ending:
    """What a stage returns to end the cycle."""

    state: EndState
    outcome: str
    """One sentence for the operator, with the numbers that decided."""


@dataclass
class Progress:
    """Counts of one stage on their way to its row. Cheap to call for every unit."""

    name: str
    sink: Callable[[Progress], None]
    """Writes the stage's row."""
    num_done: int = 0
    num_total: int = 0
    """0 while unknown."""
    counts: dict[str, int] = field(default_factory=dict)
    message: str = ""
    _written_at: float = 0.0

    def begin(self, num_total: int, num_done: int = 0, counts: Mapping[str, int] | None = None) -> None:
        """Set the state that the rows show, at the start of `run`, and write it."""
        self.num_total, self.num_done = num_total, num_done
        self.counts = dict(counts or {})
        self.flush()

    def advance(self, units: int = 1, **counts: int) -> None:
        """Add finished units and named counts; written at most every MIN_UPDATE_S."""
        self.num_done += units
        for key, value in counts.items():
            self.counts[key] = self.counts.get(key, 0) + value
        self.write()

    def put(self, **counts: int) -> None:
        """Set named counts that are no sums of units; written as `advance` writes."""
        self.counts |= counts
        self.write()

    def say(self, message: str) -> None:
        """Set the line that operators see beside the counts."""
        self.message = message
        self.write()

    def write(self) -> None:
        """Write the row unless it was written a moment ago."""
        if time.monotonic() - self._written_at >= MIN_UPDATE_S:
            self.flush()

    def flush(self) -> None:
        """Write the row now."""
        self._written_at = time.monotonic()
        self.sink(self)


@dataclass(frozen=True)
class Cycle:
    """One cycle as its stages see it. Immutable but for the rows behind it.

    `candidate` is not here: read it with `records.candidate_of(store, cycle.id)`, because the train
    stage sets it while the cycle runs.
    """

    id: str
    seed: int
    """Every random choice of the cycle derives from it."""
    incumbent: str
    """Name of the adapter that was active when the cycle started; `base` for none."""
    config: LearnerConfig
    """With the cycle's overrides applied."""
    engine: EngineConfig
    """What serves, which decides where training may run."""
    agent: AgentConfig
    """How live tasks run, which practice and evaluation follow."""
    home: Home
    store: Store
    app: App
    app_ref: str
    """`module:attribute` of the application, for processes that import it themselves."""
    tools: tuple[ToolSpec, ...]
    """What the model may call, in the order in which it sees them: the application's functions and its MCP servers'."""
    client: AsyncClient
    """Connected with the home's admin token. Wrap calls in `sampling.patiently`."""
    progress: Callable[[str], Progress]
    """The progress of a stage, by name."""
    cancelled: asyncio.Event
    """Set when an operator cancelled the cycle or the process is to stop; wait on it beside anything long."""
    resumed: asyncio.Event
    """Cleared while the learner is paused; `sampling.patiently` waits for it."""

    @property
    def folder(self) -> Path:
        """The cycle's working files: config.json, pairs.jsonl, the trainer's files, report.json."""
        return self.home.cycles / self.id

    def adapter_of(self, role: str) -> str:
        """The adapter that a role's configuration names: `active` is the incumbent, anything else a name."""
        return self.incumbent if role == "active" else role

    def check(self) -> None:
        """Raise CycleCancelledError where the cycle was cancelled; call it between units."""
        if self.cancelled.is_set():
            raise CycleCancelledError("cancelled")


class Stage(Protocol):
    """One stage of a cycle."""

    @property
    def name(self) -> str:
        """One of STAGE_NAMES."""
        ...

    async def run(self, cycle: Cycle) -> Ending | None:
        """Do what is left to do; return None to go on, or an Ending to end the cycle here.

        Calls `cycle.check()` between units and leaves long waits when `cycle.cancelled` is set. Raises
        NothingToLearnError (stopped), CycleCancelledError (cancelled), anything else: failed. Blocking
        work of more than a few milliseconds goes to a thread or a process, so that leases are renewed.
        """
        ...
