"""Held-out sets as they were when they were used: versions, and what else a result depends on.

A set is known by the digest of its tasks; the first one of an application is version 1, a changed one the next.
Results of different versions never meet (`evaluation_results.Basis`); what changed since the last evaluation is said.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nightschool_server.agent.formats import action_format
from nightschool_server.agent.limits import call_limits
from nightschool_server.chat import canonical_json
from nightschool_server.evaluation_set import EvaluationSet, digest_of

from nightschool_learner.evaluation_results import Basis
from nightschool_learner.examiner import task_limits
from nightschool_learner.stages import Cycle

if TYPE_CHECKING:
    from nightschool_server.store.store import Store


@dataclass(frozen=True)
class SetVersion:
    """A version of an application's held-out set."""

    digest: str
    app: str
    version: int
    n: int
    families: Mapping[str, Mapping[str, Any]]
    """`{"n", "digest"}` by family."""


def protocol_of(cycle: Cycle, base_model_digest: str) -> str:
    """Digest of everything but set and adapter that a result depends on and that can be named.

    What the tools and MCP servers do inside is not in it: after a change of that, change the set, too.
    """
    app, config = cycle.app, cycle.config.evaluate
    return hashlib.sha256(
        canonical_json(
            [
                base_model_digest,
                app.system_prompt,
                [[spec.name, spec.description, spec.schema, spec.strict] for spec in cycle.tools],
                dict(app.initial_state),
                [action_format(cycle.agent).name, asdict(task_limits(cycle)), asdict(call_limits(cycle.agent))],
                [config.temperature, config.top_p],
                list(config.refusal_patterns),
                *([cycle.agent.code.model_dump()] if cycle.agent.action_format == "code" else []),
            ]
        ).encode()
    ).hexdigest()


def register(store: Store, app: str, held_out: EvaluationSet) -> SetVersion:
    """The version of a set, which becomes the application's next one where it was never used."""
    families: dict[str, dict[str, Any]] = {}
    for name in sorted({task.family for task in held_out.tasks}):
        tasks = tuple(task for task in held_out.tasks if task.family == name)
        families[name] = {"n": len(tasks), "digest": digest_of(tasks)}
    with store.transaction() as db:
        found = db.execute("SELECT 1 FROM evaluation_sets WHERE digest = ?", (held_out.digest,)).fetchone()
        if found is None:
            db.execute(
                "INSERT INTO evaluation_sets (digest, app, version, n, families, created_at) VALUES "
                "(?, ?, (SELECT COALESCE(MAX(version), 0) + 1 FROM evaluation_sets WHERE app = ?), ?, ?, ?)",
                (held_out.digest, app, app, len(held_out.tasks), json.dumps(families), time.time()),
            )
    return version_of(store, held_out.digest)


def version_of(store: Store, digest: str) -> SetVersion:
    """A set that was registered."""
    row = store.one("SELECT digest, app, version, n, families FROM evaluation_sets WHERE digest = ?", (digest,))
    assert row is not None, f"set {digest} was never registered"
    return SetVersion(**{**row, "families": json.loads(row["families"])})


def comparability(store: Store, now: SetVersion, basis: Basis, cycle_id: str) -> tuple[str, ...]:
    """What to say of the evaluation before this cycle's; nothing where its numbers compare with today's."""
    last = store.one(
        "SELECT cycle_id, set_digest, protocol FROM evaluations WHERE cycle_id <> ? ORDER BY created_at DESC LIMIT 1",
        (cycle_id,),
    )
    if last is None:
        return ()
    if last["set_digest"] != now.digest:
        return (_changed_set(store, now, last),)
    if last["protocol"] != basis.protocol:
        return (
            f"the base model, the application or the limits of evaluation changed since {last['cycle_id']}: "
            "its rates do not compare with these; both adapters were measured anew",
        )
    return ()


def discordant_share(store: Store, basis: Basis) -> float | None:
    """On what share of tasks the last two adapters compared on this basis differed; None where there is none."""
    row = store.one(
        "SELECT n, num_gained + num_lost AS differing FROM evaluations WHERE set_digest = ? AND protocol = ? "
        "ORDER BY created_at DESC LIMIT 1",
        (basis.set_digest, basis.protocol),
    )
    return max(1, row["differing"]) / row["n"] if row else None


def _changed_set(store: Store, now: SetVersion, last: Mapping[str, Any]) -> str:
    row = store.one("SELECT version, families FROM evaluation_sets WHERE digest = ?", (last["set_digest"],))
    if row is None:
        return f"the evaluation set changed since {last['cycle_id']}: its rates do not compare with these"
    before: dict[str, Any] = json.loads(row["families"])
    changed = [
        name
        for name in sorted({*before, *now.families})
        if before.get(name, {}).get("digest") != now.families.get(name, {}).get("digest")
    ]
    return (
        f"the evaluation set changed since {last['cycle_id']} (version {row['version']} to {now.version}; "
        f"families {', '.join(changed)}): its rates do not compare with these; both adapters were measured anew"
    )
