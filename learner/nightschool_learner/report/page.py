"""The report as one HTML file that needs nothing else: no script, no request, every text escaped.

Owns the environment of the template `page.html`; what it shows is `contents.Report`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from nightschool_server.store.store import Store

from nightschool_learner.report import charts, words
from nightschool_learner.report.contents import Report
from nightschool_learner.report.pictures import Album
from nightschool_learner.report.summary import points, rule_title, summary_of

MAX_LINKS = 200
"""Rows of the lineage table; the JSON file has them all."""


def render(report: Report, store: Store, pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures` are those of held-out tasks, by sha256."""
    row = report.evaluation
    return _template().render(
        report=report,
        summary=summary_of(report),
        picture=Album(store, pictures).uri,
        charts=charts.training_charts(report.training.curves) if report.training else [],
        difference=charts.interval_chart(
            row.interval_low, row.interval_high, row.candidate_success - row.incumbent_success
        )
        if row
        else None,
        max_links=MAX_LINKS,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, rate_chart=charts.rate_chart, rule_title=rule_title)
    environment.filters.update(
        when=_when, duration=_duration, points=points, percent=_percent, count=_count, small=_small
    )
    return environment.get_template("page.html")


def _when(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) if at else "not yet"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _count(num: int) -> str:
    return f"{num:,}"


def _small(value: float) -> str:
    return f"{value:.3g}"
