"""Labels: pairs of candidates that people compare, blind, for the gold set.

What is offered are candidates that both ran in one step, whether or not the critic was sure of them: a set of those
that it decided would flatter it. Which of the two is shown as `a` is drawn from the pair's id alone, so that neither
the sampling's order nor the critic's verdict shows, and the same pair reads the same everywhere. Owns the rows of
`labels`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nightschool_server.errors import InvalidRequestError
from nightschool_server.store.store import Store

from nightschool_learner.gold import Better, turns_after_task
from nightschool_learner.prompts import CandidateView, write_turn

_SWAPPED: dict[Better, Better] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class Offer:
    """A pair to be labelled, as a person sees it."""

    id: str
    task: str
    images: tuple[str, ...]
    """sha256 of the task's pictures."""
    history: tuple[str, ...]
    """The turns before, one text each."""
    a: CandidateView
    b: CandidateView

    def to_json(self) -> dict[str, Any]:
        """A line of a file to be filled in at `better`."""
        sides = {side: {"action": v.action, "observation": v.observation} for side, v in (("a", self.a), ("b", self.b))}
        shown = {"id": self.id, "task": self.task, "images": list(self.images), "history": list(self.history)}
        return {**shown, **sides, "better": ""}


def offers(store: Store, labelled_by: str, cycle_id: str = "") -> list[Offer]:
    """The pairs that `labelled_by` has not labelled yet, in an order that depends on their ids alone."""
    rows = store.query(
        "SELECT x.step_id, x.position AS lower, y.position AS higher, s.history, t.prompt, t.images, "
        " x.text AS lower_text, x.observation AS lower_seen, y.text AS higher_text, y.observation AS higher_seen "
        "FROM candidates x JOIN candidates y ON y.step_id = x.step_id AND y.position > x.position "
        "JOIN steps s ON s.id = x.step_id JOIN rollouts r ON r.id = s.rollout_id JOIN tasks t ON t.id = r.task_id "
        "LEFT JOIN labels l ON l.step_id = x.step_id AND l.a = x.position AND l.b = y.position AND l.labelled_by = ? "
        "WHERE x.failure = '' AND y.failure = '' AND l.step_id IS NULL AND (? = '' OR r.cycle_id = ?)",
        (labelled_by, cycle_id, cycle_id),
    )
    found = [_offer(row) for row in rows]
    return sorted(found, key=lambda offer: hashlib.sha256(offer.id.encode()).digest())


def insert_label(store: Store, offer_id: str, better: Better, labelled_by: str) -> None:
    """Keep what somebody said of an offer, by its sides as shown. Raises InvalidRequestError for an unknown id."""
    step_id, lower, higher = _places(store, offer_id)
    stored = _SWAPPED[better] if _is_swapped(offer_id) else better
    with store.transaction() as db:
        db.execute(
            "INSERT OR REPLACE INTO labels (step_id, a, b, better, labelled_by, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (step_id, lower, higher, stored, labelled_by, time.time()),
        )


def _places(store: Store, offer_id: str) -> tuple[str, int, int]:
    step_id, _, places = offer_id.partition(":")
    try:
        lower, higher = (int(place) for place in places.split(":"))
    except ValueError:
        lower, higher = -1, -1
    known = store.one(
        "SELECT COUNT(*) AS n FROM candidates WHERE step_id = ? AND position IN (?, ?) AND failure = ''",
        (step_id, lower, higher),
    )
    if known is None or known["n"] != 2 or not lower < higher:
        raise InvalidRequestError("id", f"{offer_id!r} is no pair of this home: take ids from `pairs label --export`")
    return step_id, lower, higher


def _offer(row: Mapping[str, Any]) -> Offer:
    offer_id = f"{row['step_id']}:{row['lower']}:{row['higher']}"
    views = [CandidateView(row["lower_text"], row["lower_seen"]), CandidateView(row["higher_text"], row["higher_seen"])]
    a, b = reversed(views) if _is_swapped(offer_id) else views
    history = tuple(write_turn(message) for message in turns_after_task(row["history"]))
    return Offer(offer_id, row["prompt"], tuple(json.loads(row["images"])), history, a, b)


def _is_swapped(offer_id: str) -> bool:
    return bool(hashlib.sha256(f"side {offer_id}".encode()).digest()[0] & 1)
