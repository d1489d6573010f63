"""The main job: one night at the shop, from the first request to a proven adapter.

Starts a real server, keeps streaming clients busy from the first moment to the last, lets the learner practise on
what they asked, waits for the gate, rolls back, lets a critic that prefers the worse train an adapter and sees the
gate reject it, rolls forward, and practises once more from the promoted adapter. Writes `report.json` into the home
folder; exit code 0 only if every promise held, 1 otherwise, 2 for a home folder that is not empty.

DEMO_HOME=DIR puts the home folder there; the default is a fresh one below `.demo/`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nightschool import AsyncClient, Cycle

from examples.shop.night.display import Display
from examples.shop.night.report import MIN_SERVED, Report, duration_s
from examples.shop.night.server import ROOT, ServerDiedError, serving
from examples.shop.night.traffic import LiveTraffic

SETTINGS = ROOT / "examples" / "shop" / "config.toml"
NUM_CLIENTS = 4
NUM_SEEDS = 80
"""Live requests that are answered before the first cycle starts."""
BASE = "base"
ALLOW_SABOTAGE = "learner.fault_injection.allow=true"
SABOTAGE = (
    "learner.fault_injection.invert_critic=true", "learner.synthesize.num_tasks=200", "learner.pairs.min_pairs=24",
)  # fmt: skip
ONCE_MORE = ("learner.train.learning_rate=5e-4",)
"""After a first night little is left to learn, often nothing; what there is wants a lower rate."""


@dataclass(frozen=True)
class Night:
    """What was practised, in the order in which it happened."""

    first: Cycle
    rollback_s: float
    sabotaged: Cycle
    was_held: bool
    """Whether the sabotaged cycle left the base, which was active before it."""
    promote_s: float
    second: Cycle


async def night(home: Path, display: Display) -> Report | None:
    """The whole night. None where the first cycle ended without a promotion; the display has said why."""
    async with serving(home, [ALLOW_SABOTAGE]), AsyncClient(home=home) as client:
        display.say(f"serving on {client.settings.address}; {NUM_CLIENTS} streaming clients start to ask")
        async with LiveTraffic(client, NUM_CLIENTS) as traffic:
            await traffic.wait_for(NUM_SEEDS)
            display.say(f"{traffic.served} requests answered: enough to learn from")
            lived = await live_through(client, display)
            await traffic.wait_for(max(MIN_SERVED, traffic.served + NUM_CLIENTS))
        for line in traffic.lines():
            display.say(line)
        for failure in traffic.failures:
            display.say(f"failed: {failure}")
    if lived is None or lived.first.evaluation is None:
        return None
    evaluation, again, spoiled = lived.first.evaluation, lived.second.evaluation, lived.sabotaged.evaluation
    return Report(
        before=evaluation.incumbent_success,
        after=evaluation.candidate_success,
        n=evaluation.n,
        interval=(evaluation.interval_low, evaluation.interval_high),
        p=evaluation.p_value,
        cycle_s=duration_s(lived.first),
        served=traffic.served,
        failed=len(traffic.failures),
        promote_s=lived.promote_s,
        rollback_s=lived.rollback_s,
        second_state=str(lived.second.state),
        second_after=again.candidate_success if again else None,
        second_p=again.p_value if again else None,
        sabotage_rejected=lived.sabotaged.state == "rejected" and lived.was_held,
        sabotage_after=spoiled.candidate_success if spoiled else None,
    )


async def live_through(client: AsyncClient, display: Display) -> Night | None:
    """Practise, roll back, be sabotaged, roll forward, practise again. None where the first cycle promoted nothing."""
    first = await practise(client, display, "learn from what the shop was asked")
    if first.state != "promoted":
        return None
    rollback_s = await swap(client, BASE, display)
    sabotaged = await practise(client, display, "sabotage: the critic prefers the worse", SABOTAGE)
    was_held = (await client.admin.status()).active_adapter == BASE
    promote_s = await swap(client, first.candidate, display)
    second = await practise(client, display, "once more, from the promoted adapter", ONCE_MORE)
    return Night(first, rollback_s, sabotaged, was_held, promote_s, second)


async def practise(client: AsyncClient, display: Display, reason: str, overrides: tuple[str, ...] = ()) -> Cycle:
    """Run one learning cycle while the clients go on. Returns it as it ended."""
    display.say(f"a cycle starts: {reason}")
    queued = await client.admin.cycles.trigger(reason=reason, overrides=overrides)
    cycle = await display.follow(client.admin.cycles.watch(queued.id))
    display.say(f"cycle {cycle.state}: {cycle.outcome}")
    return cycle


async def swap(client: AsyncClient, name: str, display: Display) -> float:
    """Make `name` the active adapter. Returns the seconds until a reply named it, the RPC included."""
    started_at = time.monotonic()
    await client.admin.adapters.rollback(to=name, reason="the demo shows both ways")
    while (await client.generate("Add 10 and 20.", max_tokens=1, learning="no_log")).adapter != name:
        pass
    duration = time.monotonic() - started_at
    display.say(f"{name} answers {duration:.2f} s after the call")
    return duration


def home_folder() -> Path:
    """Where the home folder goes. Raises FileExistsError for one that holds something already."""
    chosen = os.environ.get("DEMO_HOME")
    home = Path(chosen) if chosen else ROOT / ".demo" / datetime.now().strftime("%Y%m%d-%H%M%S")
    if home.is_dir() and any(home.iterdir()):
        raise FileExistsError(f"DEMO_HOME={home} is not empty: name a folder that does not exist yet")
    return home.resolve()


def main() -> int:
    """Run the night. Returns the exit code."""
    display = Display()
    try:
        home = home_folder()
    except FileExistsError as error:
        display.say(str(error))
        return 2
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(SETTINGS, home / "config.toml")
    display.say(f"home folder: {home}")
    try:
        report = asyncio.run(night(home, display))
    except ServerDiedError as error:
        display.say(f"the server did not start:\n{error}")
        return 1
    if report is None:
        display.say(f"nothing was promoted; see {home / 'server.log'} and {home / 'cycles'}")
        return 1
    report.write(home / "report.json")
    for line in report.lines():
        display.say(line)
    display.say(f"report: {home / 'report.json'}; plots: {home / 'cycles'}/*/plots")
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
