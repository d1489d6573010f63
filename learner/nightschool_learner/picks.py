"""The pairs stage of `rest`: the picks of practice as answers to imitate (ReST-EM, arXiv 2312.06585).

A pick counts where facts or the critic decided its step and its rollout ended with an answer: a way that led nowhere
holds no solution. Each such step makes one row, the pick beside its surest loser, and fine-tuning (`train.method =
"sft"`) reads the pick alone; steps on which all samples agreed go along as anchors, as in every recipe. `max_per_task`
is the cut-off of solutions of one problem.

Deviations from ReST-EM: the reward is what facts and the critic say of a step, not a right final answer; a cycle goes
on from the last accepted adapter, not from the base model.
"""

from __future__ import annotations

from nightschool_server.store.store import Store

from nightschool_learner import practice_records
from nightschool_learner.pairs import PairsStage
from nightschool_learner.practice_records import DecidedStep


def picks_stage() -> PairsStage:
    """The stage that `picks` names."""
    return PairsStage(steps_of=answered_steps)


def answered_steps(store: Store, cycle_id: str) -> list[DecidedStep]:
    """The decided steps of rollouts that ended with an answer."""
    rows = store.query("SELECT id FROM rollouts WHERE cycle_id = ? AND outcome = 'answered'", (cycle_id,))
    answered = {row["id"] for row in rows}
    return [step for step in practice_records.decided_steps(store, cycle_id) if step.step.rollout_id in answered]
