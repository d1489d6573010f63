"""What `nightschool doctor` and `nightschool check` find: one line each, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nightschool_server.errors import NightschoolError

State = Literal["ok", "no", "fault"]
"""`fault`: serving as configured would fail. `no`: something that does not work, and need not."""

_MIN_NAME_CHARS = 13


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    group: str
    name: str
    state: State
    text: str


def checked(group: str, text: Callable[[], str], name: str = "") -> Finding:
    """What `text` says, or the fault that it raises."""
    try:
        return Finding(group, name, "ok", text())
    except NightschoolError as error:
        return Finding(group, name, "fault", str(error))


def has_fault(findings: list[Finding]) -> bool:
    """Whether serving as configured would fail."""
    return any(finding.state == "fault" for finding in findings)


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [asdict(finding) for finding in findings]


def as_text(findings: list[Finding]) -> str:
    """One line a finding, aligned, a group's name once."""
    lines, group = [], ""
    width = max([_MIN_NAME_CHARS, *(len(finding.name) for finding in findings)])
    for finding in findings:
        label = finding.group if finding.group != group else ""
        group = finding.group
        mark = {"ok": "yes" if finding.name else "ok", "no": "no", "fault": "FAULT"}[finding.state]
        lines.append(f"{label:<10} {finding.name:<{width}} {mark:<6} {' '.join(finding.text.split())}".rstrip())
    return "\n".join(lines)
