"""`nightschool status`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from nightschool.cli.output import json_option, when, write_fields, write_json
from nightschool.cli.root import Target
from nightschool.records import EngineStatus, LearnerStatus, LogStatus, Status


@click.command(epilog="Example: nightschool status --json")
@json_option
@click.pass_obj
def status(target: Target, *, as_json: bool) -> None:
    """Show the server, its engine, its log and its learner."""
    with target.client() as client:
        found = client.admin.status()
    if as_json:
        write_json(found)
    else:
        write_fields(_fields(found, target))


def _fields(found: Status, target: Target) -> Iterator[tuple[str, str]]:
    yield "server", f"{'healthy' if found.healthy else 'UNHEALTHY'}, version {found.version}"
    yield "since", when(found.started_at)
    yield "home", found.home
    yield "model", found.base_model
    yield "engine", f"{found.engine}{_engine(found.engine_status)}"
    yield "active adapter", found.active_adapter
    yield "previous adapter", found.previous_adapter
    if found.engine_status is not None:
        yield "merged adapter", found.engine_status.merged_adapter
    yield "requests", f"{found.requests_served} served, {found.requests_failed} failed"
    yield "log", _log(found.log)
    if found.learner is not None:
        yield from _learner(found.learner)


def _engine(engine: EngineStatus | None) -> str:
    return f", {engine.num_running} running, {engine.num_waiting} waiting" if engine is not None else ""


def _log(log: LogStatus | None) -> str:
    if log is None:
        return ""
    lost = f", {log.num_dropped} LOST" if log.num_dropped else ""
    return f"{log.num_requests} requests, {log.num_feedback} with feedback{lost}"


def _learner(learner: LearnerStatus) -> Iterator[tuple[str, str]]:
    state = "paused" if learner.paused else "running" if learner.running else "not running"
    yield "learner", f"{state}, {learner.num_new_seeds} new seeds"
    yield "current cycle", learner.current_cycle
    yield "next cycle", when(learner.next_run_at)
    yield "last error", learner.last_error
