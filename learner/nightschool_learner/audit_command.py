"""`nightschool critic audit`: the configured critic against the gold set, beside a server that runs.

Owns the command line and its output; nothing is changed but the cache of answers. Exit codes: 0 the critic holds its
floors, 1 it does not or the server failed, 2 the user's mistake.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import nightschool
from nightschool_server.app import App, load_app
from nightschool_server.config.config import Config, load_config, split_overrides
from nightschool_server.errors import AppError, ConfigError, FailedPreconditionError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from nightschool_learner import records
from nightschool_learner.agreement import PAPER_AGREEMENT, Agreement
from nightschool_learner.audit import Audit, audit, gold_of, insert_audit
from nightschool_learner.critics import open_critic
from nightschool_learner.errors import LearnerError
from nightschool_learner.panels import open_panel
from nightschool_learner.sampling import PracticeSampler, connect
from nightschool_learner.stages import Cycle, Progress
from nightschool_learner.statistics import Interval

NOT_TRUSTED = 1
USER_MISTAKE = 2

EXAMPLE = """example:
  nightschool critic audit --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit, print, and say by the exit code whether the critic holds its floors."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    home = Home(options.home.expanduser().absolute())
    try:
        overrides = split_overrides(options.settings) | ({"agent.app": options.app} if options.app else {})
        config = load_config(home, overrides=overrides)
        if not config.app:
            raise ConfigError("agent.app is not set: name the application with --app, or in config.toml")
        with closing(Store.open(home, migrate=False)) as store:
            found = asyncio.run(run(home, config, store, options.gold))
    except (ConfigError, AppError, FailedPreconditionError) as error:
        return _fail(str(error), USER_MISTAKE)
    except (LearnerError, nightschool.NightschoolError) as error:
        return _fail(str(error), NOT_TRUSTED)
    print(json.dumps(found.to_json(), indent=2) if options.as_json else "\n".join(lines_of(found)))  # noqa: T201
    return NOT_TRUSTED if found.faults else 0


async def run(home: Home, config: Config, store: Store, gold_file: Path | None) -> Audit:
    """The audit of the critic that `config` names. Raises AppError where there is no gold."""
    async with connect(home) as client:
        cycle = audited_cycle(home, config, store, load_app(config.app), client)
        gold = gold_of(cycle, gold_file)
        if not gold:
            raise AppError(
                f"app {cycle.app.name!r} has no gold set: give App(gold=Path(...)) or --gold a file, "
                "or label pairs with `nightschool pairs label`"
            )
        sampler = PracticeSampler(cycle)
        async with open_critic(cycle, sampler) as critic, open_panel(cycle, sampler) as panel:
            found = await audit(cycle, critic, panel, gold)
        insert_audit(store, None, found)
        return found


def audited_cycle(home: Home, config: Config, store: Store, app: App, client: nightschool.AsyncClient) -> Cycle:
    """What the critic's making needs of a cycle; there is no row of it."""
    resumed = asyncio.Event()
    resumed.set()
    home.cycles.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Cycle(
        id="",
        seed=0,
        incumbent=records.active_adapter(store),
        config=config.learner,
        engine=config.engine,
        agent=config.agent,
        home=home,
        store=store,
        app=app,
        app_ref=config.app,
        tools=(),
        client=client,
        progress=lambda name: Progress(name, lambda progress: None),
        cancelled=asyncio.Event(),
        resumed=resumed,
    )


def lines_of(found: Audit) -> list[str]:
    """The audit for a person."""
    a = found.agreement
    rows = [
        ("gold pairs", f"{a.num_pairs}" + (f", {a.num_ties} of them ties" if a.num_ties else "")),
        ("agreement", _agreement(a)),
        ("kappa", _number(a.kappa)),
        ("abstained", f"{_share(a.abstention_rate)}{_counts(a.abstentions)}"),
        ("first shown won", _interval(a.first_win_rate)),
        ("second shown won", _interval(a.second_win_rate)),
        (
            "length correlation",
            f"{_number(a.length_correlation)}, of the gold labels {_number(a.gold_length_correlation)}",
        ),
        ("parse failures", _share(a.parse_failure_rate)),
        ("decided by", _counts(a.decided_by).removeprefix(": ")),
        ("cost", f"{found.num_tokens} tokens, {found.num_cached} answers known before, {found.duration_s:.1f} s"),
    ]
    if a.num_ties:
        rows.insert(4, ("decided ties", f"{a.num_ties_decided} of {a.num_ties}"))
    width = max(len(name) for name, _ in rows)
    written = [f"{name.ljust(width)}  {text}".rstrip() for name, text in rows]
    return [*written, *(f"not to be trusted: {fault}" for fault in found.faults)]


def _agreement(a: Agreement) -> str:
    if a.agreement is None or a.rate is None:
        return "nothing was decided"
    return (
        f"{a.rate:.1%} of {a.num_decided} decided, 95% interval {a.agreement.low:.1%} to {a.agreement.high:.1%} "
        f"(SPORT's critic {PAPER_AGREEMENT:.0%}: {a.against_paper})"
    )


def _interval(interval: Interval | None) -> str:
    return "not counted" if interval is None else f"95% interval {interval.low:.1%} to {interval.high:.1%}"


def _share(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.2f}"


def _counts(counts: object) -> str:
    assert isinstance(counts, dict)
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f": {said}" if said else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool critic audit",
        description="Measure the critic against pairs that people, or a rule, decided.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, required=True, help="the home of a server that runs")
    parser.add_argument("--app", default="", metavar="MODULE:ATTRIBUTE", help="the application; default: config.toml's")
    parser.add_argument("--gold", type=Path, metavar="FILE", help="a gold set; default: the application's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="a setting, e.g. learner.critic.rubric=step-2",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", dest="as_json", help="write JSON")
    return parser


def _fail(message: str, code: int) -> int:
    print(f"nightschool critic audit: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
