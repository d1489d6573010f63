"""What a run of a benchmark came to: rows, metrics with denominators and intervals, and how far a run is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nightschool_learner.benchmarks.attempts import AttemptLog, Run, write_whole
from nightschool_learner.benchmarks.task import Attempt, Benchmark, Metric, Row

ROWS_FILE = "rows.jsonl"
SUMMARY_FILE = "summary.json"
SUBMISSION_FILE = "submission.jsonl"
PROGRESS_S = 5.0
"""At most one line of progress in so many seconds, and one at the end."""


def write_report(benchmark: Benchmark, run: Run, log: AttemptLog) -> dict[str, Any]:
    """Score every attempt; write rows.jsonl, summary.json and, for GAIA, submission.jsonl. Returns the summary."""
    attempts = [log.attempts[task.id] for task in benchmark.tasks if task.id in log.attempts]
    rows = [benchmark.score(attempt) for attempt in attempts]
    write_whole(log.folder / ROWS_FILE, _lines([_row_json(row) for row in rows]))
    if benchmark.name == "gaia":
        answers = [{"task_id": r.attempt.task_id, "model_answer": r.about["model_answer"]} for r in rows]
        write_whole(log.folder / SUBMISSION_FILE, _lines(answers))
    summary = summary_of(benchmark, run, rows)
    write_whole(log.folder / SUMMARY_FILE, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    return summary


def summary_of(benchmark: Benchmark, run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """The metrics and what they are of."""
    outcomes = [row.attempt.outcome for row in rows]
    return {
        **asdict(run),
        "num_tasks": len(benchmark.tasks),
        "num_attempted": len(rows),
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "completion_tokens": sum(row.attempt.completion_tokens for row in rows),
        "metrics": [_metric_json(metric) for metric in benchmark.metrics(rows)],
    }


def table_of(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines for a person."""
    rows = [("metric", "value", "95% interval", "score", "of", "")]
    for metric in summary["metrics"]:
        interval = metric["interval"]
        rows.append(
            (
                metric["name"],
                "-" if metric["value"] is None else f"{metric['value']:.2%}",
                f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "",
                f"{metric['total']:.6g}",
                str(metric["n"]),
                metric["of"] + (f"; {metric['num_unscored']} of them unscored" if metric["num_unscored"] else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    done = f"{summary['num_attempted']} of {summary['num_tasks']} tasks"
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in summary["outcomes"].items())
    title = f"{summary['benchmark']}, adapter {summary['adapter']}, {done} ({outcomes or 'none run'})"
    return [title, *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)]


@dataclass
class Progress:
    """Lines on stderr while tasks are run."""

    benchmark: Benchmark
    num_total: int
    num_known: int
    """Tasks that were attempted before this process began."""
    begun: float = field(default_factory=time.monotonic)
    num_done: int = 0
    num_right: int = 0
    said_at: float = 0.0

    def add(self, attempt: Attempt) -> None:
        """Take one attempt in."""
        self.num_done += 1
        self.num_right += (self.benchmark.score(attempt).scores["official"] or 0.0) == 1.0
        now = time.monotonic()
        is_last = self.num_known + self.num_done == self.num_total
        if now - self.said_at >= PROGRESS_S or is_last:
            self.said_at = now
            print(self.line(now - self.begun), file=sys.stderr, flush=True)  # noqa: T201

    def line(self, elapsed_s: float) -> str:
        """How far the run is."""
        rate = self.num_done / elapsed_s if elapsed_s > 0 else 0.0
        left = self.num_total - self.num_known - self.num_done
        eta = f", {left / rate:.0f} s left" if rate and left else ""
        done = f"{self.num_known + self.num_done}/{self.num_total} tasks"
        return f"{done}, {self.num_right} of {self.num_done} right, {60 * rate:.1f} a minute{eta}"


def _row_json(row: Row) -> dict[str, Any]:
    return {**asdict(row.attempt), "scores": dict(row.scores), **row.about}


def _metric_json(metric: Metric) -> dict[str, Any]:
    interval = metric.interval
    value = {**asdict(metric), "value": metric.value}
    return {**value, "interval": [interval.low, interval.high] if interval else None}


def _lines(values: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
