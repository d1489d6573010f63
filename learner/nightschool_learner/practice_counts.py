"""Counts over the rows of practice: what the stages show while they run and what the report sums up.

Reads only. Progress that was lost with a killed learner is counted again here.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_server.store.store import Store

_STEPS = "SELECT s.id FROM steps s JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ?"


@dataclass(frozen=True)
class PositionFigures:
    """How much was different at one position of the cycle's rollouts."""

    position: int
    """0 for the first step."""
    num_steps: int
    num_samples: int
    num_actions: int
    """Distinct ones, summed over steps."""
    unique_rate: float
    """Distinct actions a sample: 1 where all differ, one over n where all agree."""


def position_figures(store: Store, cycle_id: str) -> tuple[PositionFigures, ...]:
    """The cycle's steps by position, the first one first."""
    rows = store.query(
        "SELECT s.position, COUNT(DISTINCT s.id) AS num_steps, SUM(c.num_samples) AS num_samples, "
        "COUNT(*) AS num_actions, 1.0 * COUNT(*) / SUM(c.num_samples) AS unique_rate "
        "FROM candidates c JOIN steps s ON s.id = c.step_id "
        f"WHERE s.id IN ({_STEPS}) GROUP BY s.position ORDER BY s.position",
        (cycle_id,),
    )
    return tuple(PositionFigures(**row) for row in rows)


def explore_counts(store: Store, cycle_id: str) -> dict[str, int]:
    """Counts over the cycle's steps and candidates, from the rows."""
    counts: dict[str, int] = {}
    sums = store.query(
        "SELECT COUNT(*) AS distinct_actions, COALESCE(SUM(num_samples), 0) AS samples, "
        "COALESCE(SUM(num_samples * (position = (SELECT picked FROM steps WHERE id = step_id))), 0) "
        " AS samples_agreeing "
        f"FROM candidates WHERE step_id IN ({_STEPS})",
        (cycle_id,),
    )[0]
    counts.update({key: int(sums[key]) for key in ("distinct_actions", "samples", "samples_agreeing")})
    spent = store.query(
        "SELECT COALESCE(SUM(num_tokens), 0) AS tokens, COALESCE(SUM(num_calls), 0) AS calls "
        f"FROM steps WHERE id IN ({_STEPS})",
        (cycle_id,),
    )[0]
    counts.update({key: int(value) for key, value in spent.items()})
    for one in position_figures(store, cycle_id):
        counts |= {f"samples_at_{one.position + 1}": one.num_samples, f"actions_at_{one.position + 1}": one.num_actions}
    for row in store.query(
        f"SELECT failure, COUNT(*) AS n FROM candidates WHERE step_id IN ({_STEPS}) AND failure <> '' GROUP BY failure",
        (cycle_id,),
    ):
        counts[f"failed_{row['failure']}"] = int(row["n"])
    of_simulators = f"SELECT COUNT(*) AS n FROM candidates WHERE step_id IN ({_STEPS}) AND simulated"
    if num_simulated := int(store.query(of_simulators, (cycle_id,))[0]["n"]):
        counts["simulated"] = num_simulated
    for row in store.query(
        "SELECT s.picked_by, COUNT(*) AS n FROM steps s JOIN rollouts r ON r.id = s.rollout_id "
        "WHERE r.cycle_id = ? AND s.picked IS NOT NULL GROUP BY s.picked_by",
        (cycle_id,),
    ):
        counts[f"picked_by_{row['picked_by']}"] = int(row["n"])
    for row in store.query(
        "SELECT outcome, COUNT(*) AS n FROM rollouts WHERE cycle_id = ? AND state <> 'running' GROUP BY outcome",
        (cycle_id,),
    ):
        counts[row["outcome"]] = int(row["n"])
    return counts


def critique_counts(store: Store, cycle_id: str) -> dict[str, int]:
    """Counts over the cycle's comparisons, duels and abstentions, from the rows: how often the first shown won, ..."""
    rows = store.query(
        f"SELECT verdict, COUNT(*) AS n FROM critiques WHERE step_id IN ({_STEPS}) GROUP BY verdict",
        (cycle_id,),
    )
    counts = {f"verdict_{row['verdict']}": int(row["n"]) for row in rows}
    sums = store.query(
        "SELECT COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens, COALESCE(SUM(completion_tokens), 0) AS "
        "completion_tokens, COALESCE(SUM(num_votes), 0) AS votes, COALESCE(SUM(num_cached), 0) AS cached "
        f"FROM critiques WHERE step_id IN ({_STEPS})",
        (cycle_id,),
    )[0]
    counts.update({key: int(value) for key, value in sums.items()})
    listed = store.query(
        "SELECT COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens, COALESCE(SUM(completion_tokens), 0) AS "
        "completion_tokens FROM verdicts WHERE cycle_id = ? AND rubric LIKE 'checklist-%'",
        (cycle_id,),
    )[0]
    for key, value in listed.items():  # checklists compare nothing: no critique has their tokens
        counts[key] += int(value)
    took = store.query(f"SELECT SUM(ROUND(1000 * seconds)) AS ms FROM duels WHERE step_id IN ({_STEPS})", (cycle_id,))
    if (ms := took[0]["ms"]) is not None:
        counts["duels_ms"] = int(ms)
    for row in store.query(
        f"SELECT component, winner IS NULL AS lost, COUNT(*) AS n FROM duels WHERE step_id IN ({_STEPS}) GROUP BY 1, 2",
        (cycle_id,),
    ):
        key = "undecided" if row["lost"] else f"decided_by_{row['component']}"
        counts[key] = counts.get(key, 0) + int(row["n"])
    for row in store.query(
        "SELECT s.abstention, COUNT(*) AS n FROM steps s JOIN rollouts r ON r.id = s.rollout_id "
        "WHERE r.cycle_id = ? AND s.abstention <> '' GROUP BY s.abstention",
        (cycle_id,),
    ):
        counts[f"abstained_{row['abstention']}"] = int(row["n"])
    return counts


def num_critiques(store: Store, cycle_id: str) -> int:
    """How many comparisons the cycle has paid for."""
    rows = store.query(
        f"SELECT COUNT(*) AS n FROM critiques WHERE step_id IN ({_STEPS})",
        (cycle_id,),
    )
    return int(rows[0]["n"])
