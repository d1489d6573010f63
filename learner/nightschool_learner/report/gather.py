"""The whole report of a cycle, gathered from its rows and its folder."""

from __future__ import annotations

from nightschool_server.evaluation_set import EvaluationSet
from nightschool_server.store.store import Store

from nightschool_learner.audit import latest_audit
from nightschool_learner.critic_drift import drifts_of
from nightschool_learner.curriculum import families_of_cycle
from nightschool_learner.endpoint_records import costs_of
from nightschool_learner.evaluation_records import evaluation_of
from nightschool_learner.report import figures, proof
from nightschool_learner.report.contents import Report
from nightschool_learner.report.examples import examples_of


def build(store: Store, cycle_id: str, held_out: EvaluationSet | None = None) -> Report:
    """The report of a cycle. `held_out` names the questions and answers of held-out tasks, which no row keeps."""
    folder = store.home.cycles / cycle_id
    facts = figures.cycle_facts(store, cycle_id)
    stages = figures.stage_facts(store, cycle_id)
    counts = figures.funnel_counts(store, cycle_id)
    practice = figures.practice_figures(store, cycle_id, stages)
    critic = figures.critic_figures(store, cycle_id, stages, counts["pairs"])
    evaluation = evaluation_of(store, cycle_id)
    return Report(
        cycle=facts,
        funnel=counts,
        funnel_steps=tuple(figures.funnel_steps(counts, stages, practice)),
        stages=stages,
        examples=examples_of(store, cycle_id),
        practice=practice,
        task_families=families_of_cycle(store, cycle_id),
        critic=critic,
        critic_audit=latest_audit(store, cycle_id),
        critic_drifts=tuple(map(str, drifts_of(store, cycle_id))),
        training=proof.training_of(folder),
        evaluation=evaluation,
        changed=proof.changed_tasks(store, evaluation, held_out) if evaluation else (),
        lineage=proof.lineage_of(store, facts, folder),
        tokens=figures.token_uses(stages, critic, evaluation),
        endpoints=tuple(costs_of(store, cycle_id)),
    )
