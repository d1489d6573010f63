"""The rows of calls to endpoints: what each role of a cycle asked of whom, and what it cost.

Owns the SQL of `endpoint_calls`. A row holds counts, never a prompt, an answer or a key.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from nightschool_server.ids import new_id
from nightschool_server.store.store import Store


@dataclass(frozen=True)
class EndpointCall:
    """One call, all its tries together."""

    cycle_id: str | None
    """None for a call outside of any cycle, e.g. of an audit by hand."""
    role: str
    base_url: str
    model: str
    error: str
    """Empty where it was answered, else the kind of the last failure."""
    num_tries: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """By the configured prices."""
    duration_s: float
    """Waiting for limits included."""


@dataclass(frozen=True)
class RoleCost:
    """What one role asked of one endpoint's model in a cycle."""

    role: str
    base_url: str
    model: str
    num_calls: int
    num_failed: int
    num_tries: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


def insert_call(store: Store, call: EndpointCall) -> None:
    """Write one call."""
    values = {"id": new_id("call"), **asdict(call), "created_at": time.time()}
    with store.transaction() as db:
        db.execute(
            f"INSERT INTO endpoint_calls ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )


def costs_of(store: Store, cycle_id: str) -> list[RoleCost]:
    """The cycle's totals, by role and model."""
    rows = store.query(
        "SELECT role, base_url, model, COUNT(*) AS num_calls, SUM(error <> '') AS num_failed, "
        "SUM(num_tries) AS num_tries, SUM(prompt_tokens) AS prompt_tokens, "
        "SUM(completion_tokens) AS completion_tokens, SUM(cost) AS cost "
        "FROM endpoint_calls WHERE cycle_id = ? GROUP BY role, base_url, model ORDER BY role, base_url, model",
        (cycle_id,),
    )
    return [RoleCost(**row) for row in rows]


def cost_report(store: Store, cycle_id: str) -> list[dict[str, Any]]:
    """`costs_of` as the cycle's report holds it."""
    return [asdict(cost) for cost in costs_of(store, cycle_id)]
