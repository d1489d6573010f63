"""What the demo found, and whether every promise held: `report.json` and the closing lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nightschool import Cycle

MIN_SERVED = 200
MAX_BEFORE = 0.65
MIN_AFTER = 0.85
MAX_P = 0.001
QUIET_CYCLE_S = 240.0
"""What is wanted of two cores that do nothing else. How fast a machine is, is no promise."""
MAX_SWAP_S = 1.0


@dataclass(frozen=True)
class Report:
    """The night in numbers."""

    before: float
    """Share of the held-out tasks that the incumbent solved, greedily."""
    after: float
    n: int
    interval: tuple[float, float]
    """95% bootstrap interval of the difference, paired by task."""
    p: float
    """Exact McNemar, two-sided."""
    cycle_s: float
    served: int
    failed: int
    promote_s: float
    """From the RPC to the end of the first reply that names the adapter."""
    rollback_s: float
    second_state: str
    """How a second cycle from the promoted adapter ended."""
    second_after: float | None
    """Held-out success of the second cycle's adapter, on the same tasks; None where it trained none."""
    second_p: float | None
    """Exact McNemar of it against the first cycle's adapter, two-sided."""
    sabotage_rejected: bool
    sabotage_after: float | None
    """Held-out success of the sabotaged adapter; None where the cycle did not get to its evaluation."""

    @property
    def promises(self) -> tuple[tuple[str, bool], ...]:
        """Each promise of the demo in words, and whether it held."""
        return (
            (f"held-out success before is at most {MAX_BEFORE:.0%}: {self.before:.1%}", self.before <= MAX_BEFORE),
            (f"held-out success after is at least {MIN_AFTER:.0%}: {self.after:.1%}", self.after >= MIN_AFTER),
            (f"paired p-value below {MAX_P}: {self.p:.2g}", self.p < MAX_P),
            (f"at least {MIN_SERVED} live requests served: {self.served}", self.served >= MIN_SERVED),
            (f"no live request failed: {self.failed}", self.failed == 0),
            (f"promotion seen within {MAX_SWAP_S:.0f} s: {self.promote_s:.2f} s", self.promote_s <= MAX_SWAP_S),
            (f"rollback seen within {MAX_SWAP_S:.0f} s: {self.rollback_s:.2f} s", self.rollback_s <= MAX_SWAP_S),
            (f"a second cycle did not fall below the first: {self.second}", self.second_held),
            ("the sabotaged adapter was rejected", self.sabotage_rejected),
        )

    @property
    def second(self) -> str:
        """The second cycle in words."""
        if self.second_after is None:
            return f"{self.second_state}, no adapter trained"
        return f"{self.second_state}, {self.after:.1%} -> {self.second_after:.1%} (p={self.second_p:.2g})"

    @property
    def second_held(self) -> bool:
        """Whether what the second cycle trained is not significantly worse than the first one's adapter."""
        if self.second_after is None or self.second_p is None:
            return self.second_state == "stopped"
        return self.second_after >= self.after or self.second_p >= 0.05

    @property
    def held(self) -> bool:
        """Whether every promise held."""
        return all(kept for _, kept in self.promises)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({**asdict(self), "held": self.held}, indent=2) + "\n")

    def lines(self) -> Iterator[str]:
        """The closing lines."""
        low, high = self.interval
        yield (
            f"held-out success {self.before:.1%} -> {self.after:.1%} (n={self.n}, difference 95% interval "
            f"{low:+.1%} to {high:+.1%}, p={self.p:.2g}) in {self.cycle_s:.0f} s"
        )
        for words, kept in self.promises:
            yield f"{'held  ' if kept else 'BROKEN'}  {words}"
        if self.cycle_s > QUIET_CYCLE_S:
            yield f"slow    the cycle took {self.cycle_s:.0f} s; {QUIET_CYCLE_S:.0f} s are wanted of two quiet cores"


def duration_s(cycle: Cycle) -> float:
    """Seconds from the cycle's start to its end."""
    assert cycle.started_at is not None
    assert cycle.ended_at is not None
    return (cycle.ended_at - cycle.started_at).total_seconds()
