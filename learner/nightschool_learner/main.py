"""The learner's process: one a home, from its command line to its end.

Owns the lock on the home, logging, signals, and what is put together at the start. A mistake in the
configuration is one sentence and exit code 2: starting the process again would not help.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from nightschool_server.app import load_app
from nightschool_server.call_form_choice import with_call_form
from nightschool_server.config.config import Config, load_config, split_overrides
from nightschool_server.errors import AppError, ConfigError, FailedPreconditionError, OverloadedError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from nightschool_learner import records
from nightschool_learner.loop import Learner
from nightschool_learner.niceness import be_nice
from nightschool_learner.registry import stages_of
from nightschool_learner.scheduler import Scheduler

logger = logging.getLogger(__name__)

LOCK_FILE = "learner.lock"
LOCK_POLL_S = 0.5
MIN_BEAT_S = 1.0
USER_MISTAKE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the learner until SIGTERM or SIGINT. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="nightschool learn", description="Learn from the home's logged requests.")
    parser.add_argument("--home", type=Path, required=True, help="the server's home folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="a setting, as of the server"
    )
    options = parser.parse_args(arguments)
    home = Home(options.home.expanduser().absolute())
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s learner %(name)s %(message)s"
    )
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    try:
        config = with_call_form(load_config(home, overrides=split_overrides(options.settings)))
        asyncio.run(_run(home, config))
    except (ConfigError, AppError, FailedPreconditionError) as error:
        print(f"nightschool learner: {error}", file=sys.stderr)  # noqa: T201
        return USER_MISTAKE
    return 0


async def _run(home: Home, config: Config) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if not config.app:
        raise ConfigError(
            "agent.app is not set: name the application in config.toml, or --set agent.app=module:attribute"
        )
    store = Store.open(home, migrate=False)
    be_nice(config.learner.nice)
    with contextlib.closing(store), _lock(home) as acquire:
        await acquire(stopping)
        if not stopping.is_set():
            await _learn(home, config, store, stopping)


async def _learn(home: Home, config: Config, store: Store, stopping: asyncio.Event) -> None:
    learner = Learner(home, config, store, load_app(config.app), stages_of, stopping)
    scheduler = Scheduler(store, config.learner.schedule)
    scheduler.start()
    heart = asyncio.create_task(_beat(store, scheduler, config.learner.poll_s, stopping))
    logger.info("event=learner_ready home=%s pid=%d app=%s", home.path, os.getpid(), config.app)
    try:
        await learner.run()
    finally:
        scheduler.stop()
        stopping.set()
        await heart


async def _beat(store: Store, scheduler: Scheduler, poll_s: float, stopping: asyncio.Event) -> None:
    """Say that the learner lives, until it stops."""
    while not stopping.is_set():
        try:
            records.heartbeat(store, os.getpid(), scheduler.next_run_at())
        except OverloadedError as error:
            logger.warning("event=heartbeat_missed error=%s", error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), max(poll_s, MIN_BEAT_S))


@contextlib.contextmanager
def _lock(home: Home) -> Iterator[Callable[[asyncio.Event], Awaitable[None]]]:
    """The lock that says who the home's learner is; the kernel frees it with the process, however that ends."""
    with (home.path / LOCK_FILE).open("w") as file:

        async def acquire(stopping: asyncio.Event) -> None:
            is_told = False
            while not stopping.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    if not is_told:
                        logger.info("event=waiting_for_other_learner home=%s", home.path)
                    is_told = True
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stopping.wait(), LOCK_POLL_S)
                else:
                    return

        yield acquire
