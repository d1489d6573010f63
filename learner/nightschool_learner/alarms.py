"""Alarms over a preference-tuning run: pure functions of its logged metrics.

DPO can lower the chosen answers' likelihood along with the rejected ones' (likelihood displacement,
arXiv 2410.08847; trl#800), run away from the reference, or learn length (R-DPO). The metrics tell: TRL
logs rewards/x = beta * (log pi(x) - log ref(x)), so a reward over beta is the log-ratio in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nightschool_learner.manifest import Alarm, AlarmLimits, last_quarter

SHOWN = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "tokens/chosen", "tokens/rejected", "entropy", "grad_norm",
)  # fmt: skip
"""The metrics that a result keeps."""


def end_metrics(rows: Sequence[Mapping[str, float]], beta: float) -> dict[str, float]:
    """Means over the last quarter of the steps, and the log-ratios to the reference in nats."""
    if not rows:
        return {}
    ended = last_quarter(rows)
    means = {key: sum(row[key] for row in ended) / len(ended) for key in SHOWN if all(key in row for row in ended)}
    for side in ("chosen", "rejected"):
        if f"rewards/{side}" in means:
            means[f"log_ratio/{side}"] = means[f"rewards/{side}"] / beta
    return means


def find_alarms(rows: Sequence[Mapping[str, float]], beta: float, limits: AlarmLimits) -> tuple[Alarm, ...]:
    """Every alarm that the rows give cause for; none for a run that logged nothing."""
    alarms: list[Alarm] = []
    broken = sum(not math.isfinite(value) for row in rows for value in row.values())
    if broken:
        alarms.append(_alarm("not_finite", broken, 0, f"{broken} logged values are not finite"))
    means = end_metrics(rows, beta)
    chosen, rejected = means.get("log_ratio/chosen", 0.0), means.get("log_ratio/rejected", 0.0)
    if chosen < -limits.max_chosen_fall:
        alarms.append(
            _alarm("chosen_fall", -chosen, limits.max_chosen_fall, f"chosen answers lost {-chosen:.2f} nats each")
        )
    drift = max(abs(chosen), abs(rejected))
    if drift > limits.max_drift:
        alarms.append(
            _alarm("drift", drift, limits.max_drift, f"policy and reference differ by {drift:.1f} nats an answer")
        )
    tokens = [(row["tokens/chosen"], row["tokens/rejected"]) for row in rows if "tokens/chosen" in row]
    ratio = sum(c for c, _ in tokens) / max(1e-9, sum(r for _, r in tokens)) if tokens else 1.0
    if ratio > limits.max_length_ratio:
        alarms.append(
            _alarm(
                "length", ratio, limits.max_length_ratio, f"chosen answers are {ratio:.2f} times as long as rejected"
            )
        )
    return tuple(alarms)


def _alarm(name: str, value: float, limit: float, message: str) -> Alarm:
    return Alarm.model_validate(
        {"name": name, "value": value, "limit": limit, "message": f"{message} (limit {limit:g})"}
    )
