"""A process for the kill -9 tests: `python -m tests.server.registry_child HOME MODE`.

Prints a line after each acknowledged change, `ACTIVE PREVIOUS`. `flip` promotes and rolls back for ever; the others end
themselves with SIGKILL in the middle of something.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from nightschool_server.adapters.registry import AdapterRegistry
from nightschool_server.config.config import Config
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.server.fake_engine import FakeEngine, make_adapter


def die(adapter: str) -> None:
    if adapter != "base":
        os.kill(os.getpid(), signal.SIGKILL)


async def flip(registry: AdapterRegistry, path: Path) -> None:
    names = [
        (await registry.import_adapter(make_adapter(path / f"flip-{number}", 0.1 * number), "", "cli", "")).record.name
        for number in (1, 2)
    ]
    number = 0
    while True:
        number += 1
        if number % 3:
            change = await registry.promote(names[number % 2], "cli", f"{number}", force=True)
        else:
            change = await registry.rollback(None, "cli", f"{number}")
        print(change.active, change.previous, flush=True)  # noqa: T201


async def main(path: Path, mode: str) -> None:
    store, engine = Store.open(Home(path / "home")), FakeEngine()
    registry = AdapterRegistry(store, store.home, engine, Config())
    await registry.start()
    if mode == "flip":
        await flip(registry, path)
    if mode == "die_in_proof":
        engine.on_score = die
    await registry.import_adapter(make_adapter(path / "source", 0.5), "", "cli", "")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
