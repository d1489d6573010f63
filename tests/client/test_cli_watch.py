"""Progress lines: what is said at once, what waits, and the bars of a terminal."""

from __future__ import annotations

import dataclasses

from nightschool import Cycle, Stage, StageState
from nightschool.cli.output import aligned, duration, size
from nightschool.cli.watch import Lines, line_of, watch_bars
from nightschool.convert import from_proto
from nightschool_proto.v1 import admin_pb2

from tests.client.fake_replies import cycle


def running(num_done: int) -> Cycle:
    return from_proto(Cycle, cycle(admin_pb2.Cycle.RUNNING, num_done))


def test_progress_is_said_at_most_once_an_interval() -> None:
    lines = Lines(interval_s=5)
    assert len(lines.of(running(1), 100.0)) == 3
    assert lines.of(running(2), 101.0) == []
    assert lines.of(running(3), 105.0) == ["explore    running 3/10 2.0/s 3s left"]
    assert lines.of(running(3), 120.0) == []


def test_a_change_of_state_is_said_at_once() -> None:
    lines = Lines(interval_s=5)
    lines.of(running(1), 100.0)
    assert lines.of(from_proto(Cycle, cycle()), 100.1) == ["cyc_1 promoted", "explore    done    10/10"]


def test_pending_stages_are_not_worth_a_line() -> None:
    (stage, *_) = running(1).stages
    pending = dataclasses.replace(stage, state=StageState.PENDING)
    assert Lines().of(dataclasses.replace(running(1), stages=(pending,)), 0.0) == ["cyc_1 running"]


def test_a_stage_without_a_total_counts_up() -> None:
    stage: Stage = dataclasses.replace(running(7).stages[1], num_total=0, rate_per_s=0.0, eta_s=0.0, message="warm")
    assert line_of(stage) == "explore    running 7 warm"


def test_bars_return_the_cycle_at_its_end() -> None:
    last = watch_bars([running(1), running(9), from_proto(Cycle, cycle())])
    assert last is not None
    assert last.state.ended
    assert watch_bars([]) is None


def test_durations_and_sizes_are_short() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 65, 11220)] == ["0s", "59s", "1m05s", "3h07m"]
    assert [size(num_bytes) for num_bytes in (12, 4096, 12_900_000)] == ["12 B", "4.0 KiB", "12.3 MiB"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc  d"]
