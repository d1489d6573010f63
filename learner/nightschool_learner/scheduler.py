"""When the learner practises by itself: every N seconds, by cron, or when enough new requests came in.

A trigger inserts a queued cycle unless one is queued or running, so there are never two at once; a paused
learner queues nothing. Cycles by hand are rows that the server writes. Owns APScheduler; the loop runs
what is queued.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from nightschool_server.config.practice import ScheduleConfig
from nightschool_server.store.store import Store

from nightschool_learner import records

logger = logging.getLogger(__name__)


class Scheduler:
    """Queues cycles at the configured times. Make and use it inside a running event loop."""

    def __init__(self, store: Store, config: ScheduleConfig) -> None:
        self._store = store
        self._config = config
        self._scheduler = AsyncIOScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": 60}
        )
        if config.interval_s:
            self._add(
                lambda: self._queue("interval", f"every {config.interval_s:g} s"),
                IntervalTrigger(seconds=config.interval_s),
                "interval",
            )
        if config.cron:
            self._add(lambda: self._queue("cron", config.cron), CronTrigger.from_crontab(config.cron), "cron")
        if config.min_new_seeds:
            self._add(self._queue_if_enough, IntervalTrigger(seconds=config.check_seeds_s), "seeds")

    def start(self) -> None:
        """Begin to fire."""
        self._scheduler.start()

    def stop(self) -> None:
        """Fire no more."""
        self._scheduler.shutdown(wait=False)

    def next_run_at(self) -> float | None:
        """Unix seconds of the next cycle by interval or cron; None where neither is set."""
        times = [job.next_run_time for job in self._scheduler.get_jobs() if job.id != "seeds" and job.next_run_time]
        return min(times).timestamp() if times else None

    def _add(self, fire: Callable[[], object], trigger: object, name: str) -> None:
        async def job() -> None:
            # A coroutine, so that it runs on the loop's thread, which owns the store's connection.
            fire()

        self._scheduler.add_job(job, trigger, id=name)

    def _queue_if_enough(self) -> None:
        num_new = records.num_new_seeds(self._store)
        if num_new >= self._config.min_new_seeds:
            self._queue("seeds", f"{num_new} new seed requests")

    def _queue(self, trigger: str, reason: str) -> None:
        if records.is_paused(self._store):
            return
        cycle_id = records.enqueue(self._store, trigger, reason)
        logger.info("event=cycle_triggered trigger=%s cycle=%s reason=%s", trigger, cycle_id, reason)
