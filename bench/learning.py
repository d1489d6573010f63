"""What a night of learning is worth at the shop, night after night, and what each guard and choice contributes.

    python bench/learning.py [--only NAME]... [--quick] [--out FILE] [--seeded DIR] [--show]

NAME is a group of rows (`cycles`, `ablations`, `recipes`) or one row (`bench/nights/rows.py`). `cycles` are five nights
in a row with the shipped settings and fresh live requests before each; the active adapter is measured after every one.
Every other row is a night (some are three) from the shipped model with something changed. Each runs a server and a
learner as real processes on a home in a temporary folder. A row takes two to four minutes on two cores, `cycles` 20.

With `--out` a row that the file holds is not run again. `--seeded` keeps the home that all rows begin on a copy of,
with its live requests and the base model measured, for the next call. Prints tables in Markdown and, as the last line,
the same as JSON; progress is on stderr. Exit code 1 where a row could not be run; the others are run all the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages, and `bench` must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack, closing

from nightschool_server.home import Home
from nightschool_server.store.store import Store

from bench.nights.home import ask, measure_active, open_shop, practise, requests_of
from bench.nights.measures import Night, night_of
from bench.nights.rows import FULL_EVALUATION, NUM_REQUESTS, SEED, SMALL, Row, chosen
from bench.nights.ruled import ruled_critic, ruled_endpoint
from bench.nights.show import line_of, tables
from bench.nights.table import MixedTableError, Table
from bench.nights.truth import Pictures, pictures_of

QUICK_REQUESTS = 60
QUICK_ROUNDS = 2


def main() -> int:
    """Run the rows that are missing and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a group or a row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small nights: to see that it runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file that rows are added to")
    parser.add_argument("--seeded", type=Path, metavar="DIR", help="keep the home that rows begin on here")
    parser.add_argument("--show", action="store_true", help="run nothing: print what --out holds")
    arguments = parser.parse_args()
    try:
        rows, table = chosen(arguments.only), Table(arguments.out, quick=arguments.quick)
    except (ValueError, MixedTableError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        bench = Bench(Path(folder), arguments.seeded, arguments.quick)
        missing = [row for row in rows if row not in table and not arguments.show]
        failed = [row.name for row in missing if not bench.fill(table, row)]
    for line in tables(table.rows):
        print(line)
    print(table.last_line())
    return 1 if failed else 0


class Bench:
    """Runs rows, each on a copy of one home."""

    def __init__(self, folder: Path, seeded: Path | None, quick: bool) -> None:
        self._folder = folder
        self._seeded = seeded or folder / "seeded"
        self._small = SMALL if quick else ()
        self._num_requests = QUICK_REQUESTS if quick else NUM_REQUESTS
        self._max_rounds = QUICK_ROUNDS if quick else sys.maxsize

    def fill(self, table: Table, row: Row) -> bool:
        """Run a row and take it in. False where it could not be run; stderr says why."""
        try:
            nights = asyncio.run(self._run(row))
        except (RuntimeError, TimeoutError) as error:  # the boundary of a row: the others do not depend on it
            _say(f"{row.name}: {type(error).__name__}: {error}")
            return False
        table.add(row, nights)
        return True

    async def _run(self, row: Row) -> list[Night]:
        if not self._seeded.exists():
            await self._make_seeded()
        home = self._folder / row.name
        await asyncio.to_thread(shutil.copytree, self._seeded, home)
        with ExitStack() as stack:
            overrides = (*row.overrides, *self._small)
            if row.has_ruled_critic:
                overrides += ruled_critic(stack.enter_context(ruled_endpoint(self._pictures(row.num_rounds - 1))))
            nights = await self._nights(row, home, overrides)
        shutil.rmtree(home)
        return nights

    async def _nights(self, row: Row, home: Path, overrides: tuple[str, ...]) -> list[Night]:
        nights: list[Night] = []
        async with open_shop(home) as client:
            for number in range(min(row.num_rounds, self._max_rounds)):
                if number:
                    await ask(client, SEED + number, self._num_requests)
                cycle = await practise(client, reason=row.name, seed=row.seed + number, overrides=overrides)
                if row.measures_active:
                    await measure_active(client, overrides)
                nights.append(await asyncio.to_thread(_measured, home, cycle.id, self._pictures(number)))
                _say(f"{row.name} {number + 1}: {line_of(nights[-1])}")
        return nights

    async def _make_seeded(self) -> None:
        """The home that every row begins on a copy of: the first live requests, and the base model measured."""
        _say(f"{self._num_requests} live requests, and the base model's held-out success")
        made = self._folder / "being-seeded"
        async with open_shop(made) as client:
            await ask(client, SEED, self._num_requests)
            await measure_active(client, (*FULL_EVALUATION, *self._small))
        shutil.move(made, self._seeded)

    def _pictures(self, number: int) -> Pictures:
        asked = (request for past in range(number + 1) for request in requests_of(SEED + past, self._num_requests))
        return pictures_of(asked)


def _measured(home: Path, cycle_id: str, pictures: Pictures) -> Night:
    with closing(Store.open(Home(home), migrate=False)) as store:
        return night_of(store, cycle_id, pictures)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
