"""Counts over the rows of practice: what the stages show while they run and what the report sums up.

Reads only. Progress that was lost with a killed learner is counted again here.
"""

from __future__ import annotations

from nightschool_server.store.store import Store

_STEPS = "SELECT s.id FROM steps s JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ?"


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


def num_steps_with_choice(store: Store, cycle_id: str) -> int:
    """How many steps of the cycle had more than one action to choose from: its coverage."""
    rows = store.query(
        "SELECT COUNT(*) AS n FROM steps s JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ? "
        "AND (SELECT COUNT(*) FROM candidates c WHERE c.step_id = s.id) > 1",
        (cycle_id,),
    )
    return int(rows[0]["n"])


def num_critiques(store: Store, cycle_id: str) -> int:
    """How many comparisons the cycle has paid for."""
    rows = store.query(
        f"SELECT COUNT(*) AS n FROM critiques WHERE step_id IN ({_STEPS})",
        (cycle_id,),
    )
    return int(rows[0]["n"])
