"""Pairs of earlier cycles, trained on again beside the fresh ones, so that a night does not undo the one before.

Newest cycles first, exactly as their trainers read them. A cycle's pairs come back only where they still say something:
the same base model and chat template, a critic of the same settings and wording, and an adapter that was promoted. What
an inverted critic or a rejected candidate was trained on stays away, unless `learner.pairs.replay_unproven` asks for
it.

Owns the choice; the rows are those of the earlier cycles' pairs.jsonl, as far as the store still has their pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nightschool_server.chat import canonical_json
from nightschool_server.config.roles import CriticConfig
from nightschool_server.home import Home
from nightschool_server.store.store import Store
from pydantic import ValidationError

from nightschool_learner.pair_export import PAIRS_FILE
from nightschool_learner.sampling import patiently
from nightschool_learner.stages import Cycle

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Ground:
    """What pairs rest on: two cycles with the same may share theirs."""

    base_model_digest: str
    chat_template_digest: str
    critic: str
    """Its settings, as canonical JSON."""
    rubrics: frozenset[str]
    """Version and digest of the wordings that judged."""

    def carries(self, earlier: Ground) -> bool:
        """Whether pairs that rest on `earlier` may stand beside those that rest on this: no rubric is foreign here."""
        return replace(earlier, rubrics=self.rubrics) == self and earlier.rubrics <= self.rubrics


async def replayed_rows(cycle: Cycle, fresh: Rows) -> Rows:
    """Rows of earlier cycles for `learner.pairs.replay_share` of what is trained on, each with `replayed_from`."""
    config = cycle.config.pairs
    wanted = num_replayed(len(fresh), config.replay_share)
    if not wanted:
        return []
    status = await patiently(cycle, cycle.client.admin.status)
    critic = canonical_json(cycle.config.critic.model_dump(mode="json"))
    rubrics = rubrics_of(cycle.store, cycle.id)
    ground = Ground(status.base_model_digest, status.chat_template_digest, critic, rubrics)
    earlier = earlier_cycles(cycle.store, cycle.id, ground, unproven=config.replay_unproven)
    return choose(((one, rows_of(cycle.home, cycle.store, one)) for one in earlier), fresh, wanted, cycle.seed)


def num_replayed(num_fresh: int, share: float) -> int:
    """How many rows make `share` of all, rounded down."""
    return int(num_fresh * share / (1 - share) + 1e-9)


def earlier_cycles(store: Store, cycle_id: str, ground: Ground, *, unproven: bool) -> list[str]:
    """Cycles whose pairs may come back, newest first."""
    rows = store.query(
        "SELECT c.id, c.state, c.config, a.manifest FROM cycles c JOIN adapters a ON a.name = c.candidate "
        "WHERE c.id < ? AND c.ended_at IS NOT NULL ORDER BY c.id DESC",
        (cycle_id,),
    )
    found = []
    for row in rows:
        config, manifest = json.loads(row["config"]), json.loads(row["manifest"])
        rests_on = Ground(
            str(manifest.get("base_model_digest")),
            str(manifest.get("chat_template_digest")),
            settings_of(row["config"]),
            rubrics_of(store, row["id"]),
        )
        is_sabotaged = bool(config.get("fault_injection", {}).get("invert_critic"))
        is_proven = row["state"] == "promoted" and not is_sabotaged
        if ground.carries(rests_on) and (is_proven or unproven):
            found.append(row["id"])
    return found


def settings_of(config: str) -> str:
    """The critic's settings in a cycle's stored configuration, with the defaults of what it did not know yet."""
    raw = json.loads(config).get("critic")
    try:
        return canonical_json(CriticConfig.model_validate(raw).model_dump(mode="json"))
    except ValidationError:  # written by another version: comparable with its like alone
        return canonical_json(raw)


def rubrics_of(store: Store, cycle_id: str) -> frozenset[str]:
    """The wordings that a cycle's comparisons were asked with."""
    rows = store.query(
        "SELECT DISTINCT q.rubric FROM critiques q JOIN steps s ON s.id = q.step_id "
        "JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ?",
        (cycle_id,),
    )
    return frozenset(row["rubric"] for row in rows)


def rows_of(home: Home, store: Store, cycle_id: str) -> Rows:
    """The rows that a cycle made itself, of pairs and pictures that the store still has."""
    path = home.cycles / cycle_id / PAIRS_FILE
    if not path.exists():
        return []
    known = {row["id"] for row in store.query("SELECT id FROM pairs WHERE cycle_id = ?", (cycle_id,))}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        row
        for row in rows
        if row["pair_id"] in known
        and "replayed_from" not in row
        and all(store.blob_path(sha256).exists() for sha256 in row["images"])
    ]


def choose(earlier: Iterator[tuple[str, Rows]], fresh: Rows, wanted: int, seed: int) -> Rows:
    """At most `wanted` rows of cycles that come newest first; which of the last cycle is drawn from `seed`."""
    draw = random.Random(f"replay {seed}")
    seen = {_key(row) for row in fresh}
    chosen: Rows = []
    for cycle_id, rows in earlier:
        for row in draw.sample(rows, len(rows)):
            if len(chosen) == wanted:
                return chosen
            if _key(row) not in seen:
                seen.add(_key(row))
                chosen.append({**row, "replayed_from": cycle_id})
    return chosen


def _key(row: dict[str, Any]) -> str:
    parts: Sequence[Any] = (row["prompt"], row["images"], row["chosen"], row["rejected"])
    return canonical_json(parts)
