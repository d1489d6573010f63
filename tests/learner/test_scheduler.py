"""When cycles queue themselves: the real scheduler on the real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from nightschool_learner import records
from nightschool_learner.scheduler import Scheduler
from nightschool_server.config.practice import ScheduleConfig
from nightschool_server.store.store import Store

from tests.learner.practice_home import log_request, open_home


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_home(tmp_path)


async def first_cycle(store: Store, config: ScheduleConfig) -> dict[str, object]:
    scheduler = Scheduler(store, config)
    scheduler.start()
    try:
        while not (rows := store.query("SELECT * FROM cycles")):  # noqa: ASYNC110
            await asyncio.sleep(0)
        return rows[0]
    finally:
        scheduler.stop()


async def test_an_interval_queues_a_cycle(store: Store) -> None:
    row = await first_cycle(store, ScheduleConfig(interval_s=0.01))
    assert (row["state"], row["trigger"], row["reason"]) == ("queued", "interval", "every 0.01 s")


async def test_there_are_never_two_cycles_at_once(store: Store) -> None:
    assert records.enqueue(store, "manual", "first") is not None
    assert records.enqueue(store, "interval", "second") is None
    with store.transaction() as db:
        db.execute("UPDATE cycles SET state = 'running'")
    assert records.enqueue(store, "interval", "third") is None
    with store.transaction() as db:
        db.execute("UPDATE cycles SET state = 'promoted'")
    assert records.enqueue(store, "interval", "fourth") is not None


async def test_enough_new_requests_queue_a_cycle_and_used_ones_do_not_count(store: Store) -> None:
    log_request(store, "a", "Sell a lamp")
    log_request(store, "b", "Sell b lamps")
    log_request(store, "c", "Sell c lamps", policy="log_only")
    assert records.num_new_seeds(store) == 2
    row = await first_cycle(store, ScheduleConfig(min_new_seeds=2, check_seeds_s=0.01))
    assert (row["trigger"], row["reason"]) == ("seeds", "2 new seed requests")
    assert records.num_new_seeds(store) == 0


async def test_cron_says_when_the_next_cycle_is(store: Store) -> None:
    scheduler = Scheduler(store, ScheduleConfig(cron="30 3 * * *"))
    scheduler.start()
    at = scheduler.next_run_at()
    scheduler.stop()
    assert at is not None
    assert at % 1800 == 0
    assert Scheduler(store, ScheduleConfig()).next_run_at() is None


async def test_a_paused_learner_queues_nothing(store: Store) -> None:
    with store.transaction() as db:
        db.execute("UPDATE learner SET paused = 1")
    scheduler = Scheduler(store, ScheduleConfig(interval_s=0.01))
    scheduler._queue("interval", "now")
    assert store.query("SELECT * FROM cycles") == []
    with store.transaction() as db:
        db.execute("UPDATE learner SET paused = 0")
    scheduler._queue("interval", "now")
    assert len(store.query("SELECT * FROM cycles")) == 1
