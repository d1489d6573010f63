"""What the demo shows: a bar for each stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from nightschool import Cycle, Stage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 5.0
"""Without a terminal, a stage in progress is reported this often."""


class Display:
    """The demo's voice on stdout."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._started_at = time.monotonic()

    def say(self, text: str) -> None:
        """One line, stamped with the seconds since the start."""
        self._console.print(f"[{time.monotonic() - self._started_at:6.1f}s] {text}", markup=False)

    async def follow(self, cycles: AsyncIterator[Cycle]) -> Cycle:
        """Show a cycle's progress until it has ended. Returns it as it ended."""
        if self._console.is_terminal:
            return await self._follow_with_bars(cycles)
        return await self._follow_with_lines(cycles)

    async def _follow_with_bars(self, cycles: AsyncIterator[Cycle]) -> Cycle:
        columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars: dict[str, TaskID] = {}
        cycle: Cycle | None = None
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console) as progress:
            async for cycle in cycles:
                for stage in cycle.stages:
                    if stage.name not in bars:
                        bars[stage.name] = progress.add_task(stage.name, start=False, total=None, note="")
                    if stage.state != "pending":
                        progress.start_task(bars[stage.name])
                    progress.update(
                        bars[stage.name], completed=stage.num_done, total=stage.num_total or None, note=_note(stage)
                    )
                    if stage.state == "done":
                        progress.stop_task(bars[stage.name])
        return _ended(cycle)

    async def _follow_with_lines(self, cycles: AsyncIterator[Cycle]) -> Cycle:
        shown: dict[str, str] = {}
        said_at = 0.0
        cycle: Cycle | None = None
        async for cycle in cycles:
            for stage in cycle.stages:
                changed = shown.get(stage.name) != stage.state
                due = stage.state == "running" and time.monotonic() - said_at >= LINE_EVERY_S
                if stage.state == "pending" or not (changed or due):
                    continue
                shown[stage.name], said_at = stage.state, time.monotonic()
                self.say(f"{stage.name:>10} {stage.state:<7} {stage.num_done}/{stage.num_total or '?'} {_note(stage)}")
        return _ended(cycle)


def _note(stage: Stage) -> str:
    counts = " ".join(f"{name}={value}" for name, value in sorted(stage.counts.items()))
    return " ".join(part for part in (counts, stage.message) if part)


def _ended(cycle: Cycle | None) -> Cycle:
    if cycle is None or not cycle.state.ended:
        raise RuntimeError("the cycle's progress ended before the cycle did")
    return cycle
