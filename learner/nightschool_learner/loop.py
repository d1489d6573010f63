"""The loop: takes a cycle, runs its stages in order, and writes how it ended.

Owns the lease, the order of the stages, cancellation, and what an exception out of a stage means. A
cycle that was running when its learner died is taken up again: its rows say what is left. A server that
is away does not end a cycle; the loop connects again and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import psutil
from nightschool import AsyncClient
from nightschool_server.agent.toolbox import list_tools
from nightschool_server.app import App
from nightschool_server.chat import ToolSpec
from nightschool_server.config.config import Config
from nightschool_server.config.learner import LearnerConfig, with_overrides
from nightschool_server.config.recipe import StagesConfig
from nightschool_server.engine import BASE
from nightschool_server.errors import AppError, ConfigError, OverloadedError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from nightschool_learner import records
from nightschool_learner.curriculum import write_families
from nightschool_learner.errors import CycleCancelledError, NothingToLearnError, ServerGoneError
from nightschool_learner.records import CycleRow
from nightschool_learner.report import files as report
from nightschool_learner.sampling import connect
from nightschool_learner.stages import STAGE_NAMES, Cycle, Progress, Stage

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RECONNECT_S = 1.0
"""Between two attempts to take up a cycle whose server, or whose store's lock, was not to be had."""

REPORTS_S = 30.0
"""Between two looks whether reports are missing."""


@dataclass
class Learner:
    """One learner process: its store, its application and what it is told to do."""

    home: Home
    config: Config
    store: Store
    app: App
    stages_of: Callable[[StagesConfig], Sequence[Stage]]
    """Who does what in a cycle of that configuration."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set on SIGTERM; a running cycle is left for the next learner."""
    _renewed_at: float = 0.0
    _reports_due_at: float = 0.0
    _unreported: set[str] = field(default_factory=set)
    """Cycles whose report could not be written by this process."""
    _taken: str = ""
    """The cycle that this process runs or ran last."""
    _tools: tuple[ToolSpec, ...] | None = None
    """Listed with the first cycle: like the server, a learner offers what there was when it began."""

    async def run(self) -> None:
        """Run cycles as they are queued, until `stopping` is set."""
        await self._report_missing()
        is_waiting = False
        while not self.stopping.is_set():
            row = records.open_cycle(self.store)
            if row is None or self._held_by_other(row) or (records.is_paused(self.store) and not row.cancel_reason):
                await self._report_missing()
                await self._rest(self.config.learner.poll_s)
                continue
            try:
                await self._run_cycle(row)
            except (ServerGoneError, OverloadedError) as error:
                # Once for each wait: a server may be away for the night.
                logger.log(
                    logging.DEBUG if is_waiting else logging.WARNING,
                    "event=cycle_waits cycle=%s error=%s",
                    row.id,
                    error,
                )
                is_waiting = True
                await self._rest(RECONNECT_S)
            else:
                is_waiting = False

    async def _report_missing(self) -> None:
        """Write the reports that are missing, now and then."""
        if time.monotonic() < self._reports_due_at:
            return
        for cycle_id in await asyncio.to_thread(report.missing, self.store):
            if cycle_id not in self._unreported:
                await self._report(cycle_id)
        self._reports_due_at = time.monotonic() + REPORTS_S

    async def _report(self, cycle_id: str) -> None:
        """Write a cycle's report; where that fails the cycle stands as it ended, and the next learner tries again."""
        try:
            await asyncio.to_thread(report.write, self.store, cycle_id, self.app)
        except Exception:  # a boundary: what is written about a cycle must not stop the next one
            logger.exception("event=report_failed cycle=%s", cycle_id)
            self._unreported.add(cycle_id)

    async def _run_cycle(self, row: CycleRow) -> None:
        async with connect(self.home) as client:
            try:
                if self._tools is None:
                    self._tools = await list_tools(self.app)
                row = self._take(row)
            except (AppError, ConfigError) as error:
                records.finish(self.store, row.id, "failed", str(error))
                return
            cycle = self._cycle(row, client)
            async with self._watched(cycle):
                state, outcome = await self._end_of(cycle)
            if state is None:
                return
            await asyncio.to_thread(write_families, self.store, cycle.id)
            records.finish(self.store, cycle.id, state, outcome)
            await self._report(cycle.id)
            records.set_last_error(self.store, outcome if state == "failed" else "")
            logger.info("event=cycle_ended cycle=%s state=%s outcome=%s", cycle.id, state, outcome)

    async def _end_of(self, cycle: Cycle) -> tuple[str | None, str]:
        """Run what is left of the cycle. (None, "") where it stays running, for the next learner."""
        try:
            return await self._run_stages(cycle)
        except NothingToLearnError as error:
            return "stopped", str(error)
        except CycleCancelledError:
            reason = records.get_cycle(self.store, cycle.id).cancel_reason
            if reason is None and self.stopping.is_set():
                return None, ""
            return "cancelled", reason or "cancelled"
        except (ServerGoneError, OverloadedError):
            raise  # nothing is wrong with the cycle: it goes on from its rows
        except ConfigError as error:
            return "failed", str(error)
        except Exception as error:  # the boundary of a cycle: whatever a stage raises ends it, on the record
            logger.exception("event=cycle_failed cycle=%s", cycle.id)
            return "failed", f"{type(error).__name__}: {error}"

    async def _run_stages(self, cycle: Cycle) -> tuple[str, str]:
        # Like the stages: they bring more than an idle learner needs.
        from nightschool_learner.readiness import check_ready

        states = records.stage_states(self.store, cycle.id)
        if ending := await check_ready(cycle):
            return ending.state, ending.outcome
        for stage in self.stages_of(cycle.config.stages):
            if states[stage.name] == "done":
                continue
            cycle.check()
            records.start_stage(self.store, cycle.id, stage.name)
            logger.info("event=stage_started cycle=%s stage=%s", cycle.id, stage.name)
            ending = await stage.run(cycle)
            cycle.progress(stage.name).flush()
            records.end_stage(self.store, cycle.id, stage.name)
            if ending is not None:
                return ending.state, ending.outcome
        raise AssertionError("the last stage must end the cycle")

    def _take(self, row: CycleRow) -> CycleRow:
        """Start a queued cycle, or take up one that was running."""
        if row.state == "running" and row.id == self._taken:
            logger.info("event=cycle_reconnected cycle=%s", row.id)
        elif row.state == "running":
            row = records.resume(self.store, row)
            logger.info("event=cycle_resumed cycle=%s num_resumes=%d", row.id, row.num_resumes)
        else:
            config = with_overrides(self.config.learner, row.overrides)
            seed = config.seed or int.from_bytes(os.urandom(4), "big")
            incumbent = records.active_adapter(self.store)
            text = config.model_dump_json(indent=2)
            row = records.start(self.store, row, seed=seed, incumbent=incumbent, config=text)
            logger.info("event=cycle_started cycle=%s incumbent=%s seed=%d", row.id, incumbent, seed)
        self._taken = row.id
        records.renew_lease(self.store, row.id, os.getpid(), self.config.learner.lease_s)
        return row

    def _cycle(self, row: CycleRow, client: AsyncClient) -> Cycle:
        """The cycle as its stages see it; writes its resolved configuration beside its files."""
        sink = partial(records.update_stage, self.store, row.id)
        progress = {name: Progress(name, sink) for name in STAGE_NAMES}
        cycle = Cycle(
            id=row.id,
            seed=row.seed,
            incumbent=row.incumbent or BASE,
            config=LearnerConfig.model_validate_json(row.config),
            engine=self.config.engine,
            agent=self.config.agent,
            home=self.home,
            store=self.store,
            app=self.app,
            app_ref=self.config.app,
            tools=self._tools or (),
            client=client,
            progress=progress.__getitem__,
            cancelled=asyncio.Event(),
            resumed=asyncio.Event(),
        )
        cycle.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (cycle.folder / CONFIG_FILE).write_text(row.config + "\n", encoding="utf-8")
        return cycle

    @contextlib.asynccontextmanager
    async def _watched(self, cycle: Cycle) -> AsyncIterator[None]:
        """Beside the stages: renew the lease, and pass on cancellation, pause and the end of the process."""
        self._obey(cycle)
        watcher = asyncio.create_task(self._watch(cycle))
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _watch(self, cycle: Cycle) -> None:
        while not cycle.cancelled.is_set():
            await self._rest(self.config.learner.poll_s)
            try:
                self._obey(cycle)
            except OverloadedError as error:
                logger.warning("event=lease_not_renewed cycle=%s error=%s", cycle.id, error)

    def _obey(self, cycle: Cycle) -> None:
        lease_s = self.config.learner.lease_s
        if time.monotonic() - self._renewed_at > lease_s / 4:
            records.renew_lease(self.store, cycle.id, os.getpid(), lease_s)
            self._renewed_at = time.monotonic()
        if self.stopping.is_set() or records.get_cycle(self.store, cycle.id).cancel_reason is not None:
            cycle.cancelled.set()
        if records.is_paused(self.store):
            cycle.resumed.clear()
        else:
            cycle.resumed.set()

    def _held_by_other(self, row: CycleRow) -> bool:
        """Whether a learner that lives holds the cycle: one on another machine, since this home's lock is ours."""
        if row.lease_pid in (None, os.getpid()) or (row.lease_until or 0) < time.time():
            return False
        return bool(psutil.pid_exists(int(row.lease_pid or 0)))

    async def _rest(self, seconds: float) -> None:
        """Wait, or until the process is to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
