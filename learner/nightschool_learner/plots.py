"""Pictures and numbers beside each cycle: how training went, and what the candidate is worth.

    plots/training.png     loss, margins, logprobs, distance to the reference, KL, length: trained on and held back
    plots/training.csv     the same as numbers, one line a step; what was looked at is in columns held_back/...
    plots/training.json    the same with the alarms, the kept step and why training stopped
    plots/evaluation.png   success before and after, over all tasks and by family, with intervals

Drawn without a display. matplotlib is imported when a picture is drawn: it costs half a second.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.manifest import Look, Result, write_whole
from nightschool_learner.statistics import wilson

CHOSEN, REJECTED, NEUTRAL, BEFORE = "#1b7837", "#b2182b", "#2166ac", "#969696"
DPI = 110

HELD_BACK = "held_back/"
_HELD = "#e08214"

_PANELS: tuple[tuple[str, str, Mapping[str, tuple[str, str]]], ...] = (
    ("Loss", "as optimised", {"loss": (NEUTRAL, "trained on"), "held_back/loss": (_HELD, "held back")}),
    (
        "Reward margin",
        "nats times beta",
        {"rewards/margins": (NEUTRAL, "trained on"), "held_back/margin": (_HELD, "held back")},
    ),
    (
        "Pairs ranked right",
        "share",
        {"rewards/accuracies": (NEUTRAL, "trained on"), "held_back/accuracy": (_HELD, "held back")},
    ),
    (
        "Logprob of the answers",
        "nats an answer",
        {"logps/chosen": (CHOSEN, "chosen"), "logps/rejected": (REJECTED, "rejected")},
    ),
    (
        "Away from the reference",
        "nats times beta",
        {"rewards/chosen": (CHOSEN, "chosen"), "rewards/rejected": (REJECTED, "rejected")},
    ),
    ("KL to the reference", "nats a token", {"held_back/kl": (_HELD, "held back")}),
    (
        "NLL of anchors",
        "nats an answer",
        {"nll/anchors": (NEUTRAL, "trained on"), "held_back/anchor_nll": (_HELD, "held back")},
    ),
    ("Length of answers", "times the reference's", {"held_back/length_ratio": (_HELD, "held back")}),
    ("Entropy", "nats a token", {"entropy": (NEUTRAL, "entropy")}),
)


def plot_training(rows: Sequence[Mapping[str, float]], result: Result, folder: Path) -> Path:
    """Draw the training curves, and write their numbers beside them. Returns the picture's path."""
    curves = training_curves(rows, result.looks)
    _write_numbers(curves, result, folder)
    figure, axes = _figure(3, 3, (12, 9.5))
    for axis, (title, unit, lines) in zip(axes.flat, _PANELS, strict=True):
        for key, (colour, label) in lines.items():
            points = [(row["step"], row[key]) for row in curves if key in row]
            marker = "o" if key.startswith(HELD_BACK) else None
            axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
        if result.looks:
            axis.axvline(result.kept_step, color=BEFORE, linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.25)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    alarms = ", ".join(alarm.name for alarm in result.alarms) or "none"
    kept = f", weights of step {result.kept_step}" if result.kept_step < result.num_steps else ""
    figure.suptitle(
        f"{result.cycle_id}: {result.num_pairs} pairs, {result.num_steps} steps{kept}, from {result.parent}; "
        f"alarms: {alarms}"
    )
    return _save(figure, folder / "training.png")


def training_curves(rows: Sequence[Mapping[str, float]], looks: Sequence[Look]) -> list[dict[str, float]]:
    """One row a step, by step: what was logged, and what was seen on the held-back rows under HELD_BACK names."""
    curves: dict[float, dict[str, float]] = {row["step"]: dict(row) for row in rows}
    for look in looks:
        seen = look.model_dump(exclude={"step", "alarms"})
        curves.setdefault(look.step, {"step": look.step}).update({HELD_BACK + k: float(v) for k, v in seen.items()})
    return [curves[step] for step in sorted(curves)]


def _write_numbers(curves: Sequence[Mapping[str, float]], result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in curves for name in row} - {"step"})
    table = io.StringIO()
    writer = csv.DictWriter(table, ["step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(curves)
    write_whole(folder / "training.csv", table.getvalue())
    told = result.model_dump(mode="json", include={"cycle_id", "parent", "kept_step", "stopped", "alarms", "metrics"})
    write_whole(folder / "training.json", json.dumps({**told, "steps": curves}, indent=1))


def plot_evaluation(row: EvaluationRow, folder: Path) -> Path:
    """Draw success before and after, with 95% Wilson intervals of each rate. Returns the file's path."""
    figure, (axis,) = _figure(1, 1, (max(6.0, 2.0 + 0.9 * (1 + len(row.families))), 4.5))
    total = {
        "family": "all",
        "n": row.n,
        "incumbent_success": row.incumbent_success,
        "candidate_success": row.candidate_success,
    }
    groups = [total, *row.families]
    for offset, key, colour, label in (
        (-0.2, "incumbent_success", BEFORE, f"before: {row.incumbent}"),
        (0.2, "candidate_success", CHOSEN if row.passed else REJECTED, f"after: {row.candidate}"),
    ):
        places = [index + offset for index in range(len(groups))]
        rates = [float(group[key]) for group in groups]
        axis.bar(places, rates, width=0.38, color=colour, label=label, yerr=_whiskers(groups, key), capsize=2)
    axis.set_xticks(range(len(groups)), [f"{g['family']}\nn={g['n']}" for g in groups], rotation=30, ha="right")
    axis.set(ylim=(0, 1.05), ylabel="success on held-out tasks")
    axis.set_title(
        f"{(row.candidate_success - row.incumbent_success) * 100:+.1f} points, {row.interval_level:.0%} interval "
        f"{row.interval_low * 100:+.1f} to {row.interval_high * 100:+.1f}, p {row.p_value:.2g}: "
        f"{'passed' if row.passed else 'rejected'}",
        fontsize=10,
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return _save(figure, folder / "evaluation.png")


def _whiskers(groups: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Distances from each rate to the ends of its Wilson interval: [below, above]."""
    below, above = [], []
    for group in groups:
        rate, n = float(group[key]), int(group["n"])
        interval = wilson(round(rate * n), n)
        below.append(max(0.0, rate - interval.low))
        above.append(max(0.0, interval.high - rate))
    return [below, above]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes if rows > 1 else axes[0]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=DPI, format="png")
    partial.replace(path)
    return path
