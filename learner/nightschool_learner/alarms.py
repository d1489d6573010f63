"""Alarms over a preference-tuning run: pure functions of its logged metrics and of its looks at held-back rows.

DPO can lower the chosen answers' likelihood along with the rejected ones' (likelihood displacement,
arXiv 2410.08847; trl#800), run away from the reference, learn length (R-DPO), or rank its pairs so surely that nothing
is left to learn and more steps only move it. The metrics tell: TRL logs rewards/x = beta * (log pi(x) - log ref(x)), so
a reward over beta is the log-ratio in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nightschool_learner.manifest import Alarm, AlarmLimits, AlarmName, Look, last_quarter

SHOWN = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "entropy", "grad_norm",
)  # fmt: skip
"""The metrics that a result keeps."""


def end_metrics(rows: Sequence[Mapping[str, float]], beta: float) -> dict[str, float]:
    """Means over the last quarter of the steps, and the log-ratios to the reference in nats."""
    if not rows:
        return {}
    ended = last_quarter(rows)
    logged = {key: [row[key] for row in ended if key in row] for key in SHOWN}
    means = {key: sum(values) / len(values) for key, values in logged.items() if values}
    for side in ("chosen", "rejected"):
        if f"rewards/{side}" in means:
            means[f"log_ratio/{side}"] = means[f"rewards/{side}"] / beta
    return means


def find_alarms(
    rows: Sequence[Mapping[str, float]], beta: float, limits: AlarmLimits, length_ratio: float = 1.0
) -> tuple[Alarm, ...]:
    """Every alarm that the rows give cause for.

    `length_ratio` is tokens of chosen over tokens of rejected answers in the pairs: what DPO learns of length
    comes from there, and what came of it is measured at the gate.
    """
    means = end_metrics(rows, beta)
    chosen, rejected = means.get("log_ratio/chosen", 0.0), means.get("log_ratio/rejected", 0.0)
    drift, margin = max(abs(chosen), abs(rejected)), means.get("rewards/margins", 0.0)
    broken = sum(not math.isfinite(value) for row in rows for value in row.values())
    return _exceeded(
        ("not_finite", broken, 0, f"{broken} logged values are not finite"),
        ("chosen_fall", -chosen, limits.max_chosen_fall, f"chosen answers lost {-chosen:.2f} nats each"),
        ("drift", drift, limits.max_drift, f"policy and reference differ by {drift:.1f} nats an answer"),
        ("length", length_ratio, limits.max_length_ratio, f"chosen answers are {length_ratio:.2f} times as long"),
        ("saturation", margin, limits.max_margin, f"the reward margin is {margin:.2f}: the pairs teach nothing more"),
    )


def look_alarms(look: Look, start: Look, limits: AlarmLimits) -> tuple[Alarm, ...]:
    """Every alarm that the held-back rows give cause for, against the look at the start."""
    fall = look.anchor_nll - start.anchor_nll
    longest, shortest = max(1.0, look.length_told), min(1.0, look.length_told)
    drift = max(look.length_ratio / longest, shortest / look.length_ratio if look.length_ratio else math.inf)
    return _exceeded(
        ("kl", look.kl, limits.max_kl, f"policy and reference are {look.kl:.3f} nats a token apart"),
        ("anchor_fall", fall, limits.max_anchor_fall, f"held-back anchors lost {fall:.2f} nats each"),
        (
            "length_drift",
            drift,
            limits.max_length_drift,
            f"answers are {look.length_ratio:.2f} times as long, chosen ones {look.length_told:.2f}",
        ),
    )


def _exceeded(*found: tuple[AlarmName, float, float, str]) -> tuple[Alarm, ...]:
    return tuple(
        Alarm(name=name, value=value, limit=limit, message=f"{message} (limit {limit:g})")
        for name, value, limit, message in found
        if value > limit
    )
