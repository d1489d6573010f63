"""A cycle's progress on stderr: bars on a terminal, otherwise one line a change, at a bounded rate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from nightschool.cli.output import duration, note
from nightschool.cli.practice import is_for_people
from nightschool.records import Cycle, Stage, StageState

LINE_INTERVAL_S = 5.0
"""Between two lines about the progress of one stage; a change of state is said at once."""


@dataclass
class Lines:
    """Which lines a change of a cycle is worth."""

    interval_s: float = LINE_INTERVAL_S
    _state: str = ""
    _stages: dict[str, Stage] = field(default_factory=dict)
    _said_at: dict[str, float] = field(default_factory=dict)

    def of(self, cycle: Cycle, now_s: float) -> list[str]:
        """The lines to write at `now_s`, a monotonic time in seconds."""
        lines = []
        if cycle.state != self._state:
            self._state = cycle.state
            lines.append(f"{cycle.id} {cycle.state}")
        for stage in cycle.stages:
            if self._is_due(stage, now_s):
                self._stages[stage.name], self._said_at[stage.name] = stage, now_s
                lines.append(line_of(stage))
        return lines

    def _is_due(self, stage: Stage, now_s: float) -> bool:
        said = self._stages.get(stage.name)
        if said is None or said.state != stage.state:
            return stage.state is not StageState.PENDING
        return stage != said and now_s - self._said_at[stage.name] >= self.interval_s


def watch_lines(changes: Iterable[Cycle]) -> Cycle | None:
    """Plain lines; returns the cycle at its end."""
    lines, last = Lines(), None
    for last in changes:
        for line in lines.of(last, time.monotonic()):
            note(line)
    return last


def watch_bars(changes: Iterable[Cycle]) -> Cycle | None:
    """A bar per stage; returns the cycle at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    last: Cycle | None = None
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[progress]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        ids = {}
        for last in changes:
            for stage in last.stages:
                if stage.name not in ids:
                    ids[stage.name] = bars.add_task(stage.name, total=None, start=False, progress="")
                # A stage without a total pulses while it runs; a pending one stands still.
                total = stage.num_total or (1 if stage.state is not StageState.RUNNING else None)
                done = total if stage.state is StageState.DONE else stage.num_done
                if stage.state is not StageState.PENDING:
                    bars.start_task(ids[stage.name])
                bars.update(ids[stage.name], total=total, completed=done, progress=_beside_bar(stage))
    return last


def line_of(stage: Stage) -> str:
    """One stage on one line."""
    parts = [f"{stage.name:<10}", f"{stage.state:<7}", progress_of(stage), _counts_of(stage), stage.message]
    return " ".join(part for part in parts if part).rstrip()


def progress_of(stage: Stage) -> str:
    """`12/150 0.8/s 2m53s left`."""
    parts = []
    if stage.num_total:
        parts.append(f"{stage.num_done}/{stage.num_total}")
    elif stage.num_done:
        parts.append(str(stage.num_done))
    if stage.state is StageState.RUNNING and stage.rate_per_s:
        parts.append(f"{stage.rate_per_s:.1f}/s")
    if stage.state is StageState.RUNNING and stage.eta_s:
        parts.append(f"{duration(stage.eta_s)} left")
    if stage.started_at and stage.ended_at:
        parts.append(f"in {duration((stage.ended_at - stage.started_at).total_seconds())}")
    return " ".join(parts)


def _beside_bar(stage: Stage) -> str:
    state = "" if stage.state in {StageState.RUNNING, StageState.DONE} else str(stage.state)
    return " ".join(part for part in (state, progress_of(stage), stage.message) if part)


def _counts_of(stage: Stage) -> str:
    shown = sorted((name, count) for name, count in stage.counts.items() if is_for_people(name))
    return " ".join(f"{name}={count}" for name, count in shown)
