"""The curriculum: how well each family of tasks was solved, cycle by cycle, and which seeds the next cycle is drawn to.

A cycle's rows of `families` derive from its practice alone, so writing them again changes nothing. The solve rate of a
task is the probe's estimate where there is one; else, of its rollout, the chance that one sample takes the picked
action at every step, and 0 where it came to no answer. Owns the SQL of `families`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from nightschool_server.chat import messages_from_json
from nightschool_server.store.store import Store

from nightschool_learner.families import Family, family_of, merged, tools_of, weight_of
from nightschool_learner.practice_records import BUDGET, REFUSED
from nightschool_learner.seed_records import KEPT, Seed
from nightschool_learner.solve_rate import ALWAYS, NEVER
from nightschool_learner.stages import Cycle


def weights_for(cycle: Cycle, seeds: Sequence[Seed]) -> list[float]:
    """The weights of a cycle's seeds, by what earlier cycles found of their families."""
    config = cycle.config.synthesize
    known = known_families(cycle.store, cycle.id, config.curriculum_cycles)
    names = families_of_seeds(cycle.store, seeds)
    return [weight_of(known.get(name), config.curriculum_floor) for name in names]


def families_of_seeds(store: Store, seeds: Sequence[Seed]) -> list[str]:
    """The family of each seed, by the tools that its request called."""
    called: dict[str, list[str]] = defaultdict(list)
    rows = store.query(
        "SELECT m.response_id, json_extract(p.value, '$.name') AS name FROM messages m, json_each(m.parts) p "
        "WHERE m.response_id IN (SELECT value FROM json_each(?)) AND json_extract(p.value, '$.type') = 'tool_result' "
        "AND json_extract(p.value, '$.name') <> '' AND NOT json_extract(p.value, '$.is_error')",
        (json.dumps([seed.response_id for seed in seeds]),),
    )
    for row in rows:
        called[row["response_id"]].append(row["name"])
    return [family_of(called[seed.response_id], seed.images, seed.files) for seed in seeds]


def known_families(store: Store, before_cycle: str, num_cycles: int) -> dict[str, Family]:
    """What the last cycles before this one found, the later ones weighing more; by name."""
    rows = store.query(
        "SELECT c.id FROM cycles c JOIN cycles b ON b.id = ? WHERE (c.created_at, c.id) < (b.created_at, b.id) "
        "AND EXISTS (SELECT 1 FROM families f WHERE f.cycle_id = c.id) ORDER BY c.created_at DESC, c.id DESC LIMIT ?",
        (before_cycle, num_cycles),
    )
    found: dict[str, list[Family]] = defaultdict(list)
    for age, row in enumerate(rows):
        for family in families_of_cycle(store, row["id"]):
            unseen = replace(family, num_tasks=0, num_pairs=0)
            # Of the cycles since it was first met it has an entry each, so that its place in the list is their age.
            found[family.name] += [unseen] * (age - len(found[family.name])) + [family]
    return {name: merged(cycles) for name, cycles in found.items()}


def families_of_cycle(store: Store, cycle_id: str) -> tuple[Family, ...]:
    """What a cycle found, the largest family first."""
    rows = store.query(
        "SELECT family AS name, num_tasks, solve_rate, num_pairs, seen_at FROM families WHERE cycle_id = ? "
        "ORDER BY num_tasks DESC, family",
        (cycle_id,),
    )
    return tuple(Family(**row) for row in rows)


def write_families(store: Store, cycle_id: str) -> None:
    """Write the cycle's rows from its practice; the same again where it is done again."""
    rates: dict[str, list[float]] = defaultdict(list)
    pairs: dict[str, int] = defaultdict(int)
    rollouts = _rollouts(store, cycle_id)
    tasks = store.query(
        "SELECT t.id, t.images, t.files, t.solve_rate, t.family, (SELECT COUNT(*) FROM pairs p JOIN steps s ON "
        " s.id = p.step_id JOIN rollouts r ON r.id = s.rollout_id WHERE r.task_id = t.id) AS num_pairs "
        "FROM tasks t WHERE t.cycle_id = ? AND t.state IN (?, ?, ?) ORDER BY t.slot",
        (cycle_id, KEPT, ALWAYS, NEVER),
    )
    for task in tasks:
        name, rate = task["family"], task["solve_rate"]
        if rollout := rollouts.get(task["id"]):
            name = family_of(rollout[0], json.loads(task["images"]), json.loads(task["files"]))
            rate = rollout[1] if rate is None else rate
        if rate is not None:
            rates[name].append(rate)
            pairs[name] += task["num_pairs"]
    rows = [
        (cycle_id, name, len(found), sum(found) / len(found), pairs[name], time.time()) for name, found in rates.items()
    ]
    with store.transaction() as db:
        db.execute("DELETE FROM families WHERE cycle_id = ?", (cycle_id,))
        db.executemany(
            "INSERT INTO families (cycle_id, family, num_tasks, solve_rate, num_pairs, seen_at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )


def _rollouts(store: Store, cycle_id: str) -> dict[str, tuple[tuple[str, ...], float]]:
    """By task: the tools that its rollout called, and the chance that one sample would have gone the same way.

    A rollout that the cycle's budget or a refused tool ended says nothing of the model.
    """
    rows = store.query(
        "SELECT r.task_id, r.outcome, s.history, "
        " (SELECT SUM(num_samples) FROM candidates WHERE step_id = s.id) AS num_samples, "
        " (SELECT num_samples FROM candidates WHERE step_id = s.id AND position = s.picked) AS num_picked "
        "FROM rollouts r JOIN steps s ON s.rollout_id = r.id WHERE r.cycle_id = ? AND r.state = 'done' "
        "AND r.outcome NOT IN (?, ?) ORDER BY r.task_id, s.position",
        (cycle_id, BUDGET, REFUSED),
    )
    found: dict[str, tuple[tuple[str, ...], float]] = {}
    for row in rows:
        _, chance = found.get(row["task_id"], ((), 1.0))
        chance *= (row["num_picked"] or 0) / row["num_samples"] if row["outcome"] == "answered" else 0.0
        found[row["task_id"]] = tools_of(messages_from_json(row["history"])), chance
    return found
