"""A night in one line for those who wait."""

from __future__ import annotations

from bench.nights.measures import Night


def line_of(night: Night) -> str:
    """How it ended and what it came to."""
    parts = [night.state]
    if night.candidate_success is not None and night.candidate_change is not None:
        found, change = night.candidate_success, night.candidate_change
        parts.append(
            f"candidate {found.rate:.1%} of {found.n} ({change.difference * 100:+.1f} points, p {change.p:.2g})"
        )
    elif night.active_success is not None:
        parts.append(f"{night.active} {night.active_success.rate:.1%} of {night.active_success.n}")
    right = f", {night.pair_accuracy:.0%} of them right" if night.pair_accuracy is not None else ""
    parts.append(f"{night.pairs} pairs{right}")
    parts.append(f"{night.seconds.get('cycle', 0):.0f} s")
    if night.candidate_success is None:
        parts.append(night.outcome)
    return "; ".join(parts)
