"""Drawings as inline SVG: lines over training steps, rates with their intervals. Colours are the page's.

Pure functions from numbers to markup; every word in them is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nightschool_learner.report.words import CURVES
from nightschool_learner.statistics import wilson

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 22
MAX_POINTS = 400
"""Of one line; more than there are pixels says nothing more."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing with its words."""

    title: str
    says: str
    labels: tuple[str, ...]
    svg: Markup


def training_charts(curves: Mapping[str, Points]) -> list[Chart]:
    """Every drawing for which the trainer logged something."""
    charts = []
    for title, says, lines in CURVES:
        known = [(label, curves[key]) for key, label in lines if curves.get(key)]
        if known:
            labels = tuple(label for label, _ in known)
            charts.append(Chart(title, says, labels, line_chart(title, [points for _, points in known])))
    return charts


def line_chart(title: str, lines: Sequence[Points]) -> Markup:
    """Lines over the steps of training, in the page's colours 0, 1, ..."""
    thinned = [_thinned(points) for points in lines]
    xs = [x for points in thinned for x, _ in points]
    ys = [y for points in thinned for _, y in points]
    low, high = _padded(min(ys), max(ys))
    left, right = min(xs), max(*xs, min(xs) + 1)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [_grid(low, high), _x_ends(left, right)]
    for number, points in enumerate(thinned):
        path = " ".join(place(x, y) for x, y in points)
        if len(points) == 1:
            x, _, y = path.partition(",")
            parts.append(Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"/>').format(number, x, y))
        else:
            parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(number, path))
    return _svg(title, HEIGHT, parts)


def interval_chart(low: float, high: float, middle: float) -> Markup:
    """A difference with its interval, against zero."""
    edge = max(abs(low), abs(high), 0.01) * 1.15

    def place(value: float) -> float:
        return 20 + (value + edge) / (2 * edge) * (WIDTH - 40)

    zero = place(0)
    kind = "better" if low > 0 else "worse" if high < 0 else "unsure"
    parts = [
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="6" y2="38"/>').format(zero),
        Markup('<text class="tick" x="{:.1f}" y="54" text-anchor="middle">no change</text>').format(zero),
        Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="22" y2="22"/>').format(
            kind, place(low), place(high)
        ),
        Markup('<circle class="mark {}" cx="{:.1f}" cy="22" r="5"/>').format(kind, place(middle)),
    ]
    says = f"difference {middle * 100:+.1f} points, from {low * 100:+.1f} to {high * 100:+.1f}"
    return _svg(says, 60, parts)


def rate_chart(before: float, after: float, n: int) -> Markup:
    """Two rates of n tasks between 0 and 1, each with its 95% Wilson interval."""
    parts = [Markup('<line class="axis" x1="10" x2="210" y1="14" y2="14"/>')]
    for kind, rate, y in (("c1", before, 9), ("c0", after, 19)):
        interval = wilson(round(rate * n), n)
        ends = (10 + 200 * interval.low, 10 + 200 * interval.high)
        parts.append(
            Markup('<line class="whisker {0}" x1="{1:.1f}" x2="{2:.1f}" y1="{3}" y2="{3}"/>').format(kind, *ends, y)
        )
        parts.append(Markup('<circle class="mark {}" cx="{:.1f}" cy="{}" r="4"/>').format(kind, 10 + 200 * rate, y))
    says = f"before {before:.1%}, after {after:.1%} of {n}"
    return Markup('<svg viewBox="0 0 220 28" class="rate" role="img" aria-label="{}">{}</svg>').format(
        says, Markup("").join(parts)
    )


def _svg(says: str, height: int, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" class="chart" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, says, Markup("").join(parts)
    )


def _grid(low: float, high: float) -> Markup:
    rows = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + share * (HEIGHT - TOP - BOTTOM)
        value = high - share * (high - low)
        rows.append(
            Markup(
                '<line class="axis" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, f"{value:.2g}")
        )
    return Markup("").join(rows)


def _x_ends(left: float, right: float) -> Markup:
    y = HEIGHT - 6
    return Markup(
        '<text class="tick" x="{}" y="{}">step {:g}</text>'
        '<text class="tick" x="{}" y="{}" text-anchor="end">{:g}</text>'
    ).format(LEFT, y, left, WIDTH - RIGHT, y, right)


def _thinned(points: Points) -> Points:
    """At most `MAX_POINTS` of them, the last one included."""
    stride = -(-len(points) // MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    return low - room, high + room
