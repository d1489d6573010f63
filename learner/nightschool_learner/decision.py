"""The gate's decision on a cycle's candidate: gathered from the rows, made once, kept as a row.

Owns what `gate.decide` is given and how its answer becomes an `EvaluationRow`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from nightschool_server.app import load_evaluation
from nightschool_server.evaluation_set import EvaluationSet

from nightschool_learner import evaluation_sets
from nightschool_learner.ability import measure_ability
from nightschool_learner.comparison import family_rows
from nightschool_learner.errors import StageFailedError
from nightschool_learner.evaluation_records import EvaluationRow, evaluation_of, insert_evaluation
from nightschool_learner.evaluation_results import Basis, results_of
from nightschool_learner.evidence import Measured, evidence_of
from nightschool_learner.gate import Decision, Evidence, decide
from nightschool_learner.held_out import Plan, basis_of, held_out_tasks, plan_of
from nightschool_learner.stages import Cycle


async def recorded_decision(cycle: Cycle, candidate: str) -> EvaluationRow:
    """The gate's decision on the cycle's candidate, made once and read from its row afterwards."""
    known = await asyncio.to_thread(evaluation_of, cycle.store, cycle.id)
    if known is not None:
        return known
    held_out = await asyncio.to_thread(held_out_tasks, cycle)
    basis = await basis_of(cycle, held_out)
    evidence = await asyncio.to_thread(_measured, cycle, candidate, held_out, basis)
    evidence = replace(evidence, ability=await measure_ability(cycle, candidate))
    return await asyncio.to_thread(_decided, cycle, candidate, basis, evidence)


def _measured(cycle: Cycle, candidate: str, held_out: EvaluationSet, basis: Basis) -> Evidence:
    """The evidence in the rows. Raises StageFailedError where results are missing."""
    plan = plan_of(cycle, held_out)
    measured = Measured(*(results_of(cycle.store, basis, name) for name in (cycle.incumbent, candidate)))
    evidence = evidence_of(cycle, basis, plan, measured)
    if evidence is None:
        raise StageFailedError(_incomplete(plan, measured))
    return evidence


def _decided(cycle: Cycle, candidate: str, basis: Basis, evidence: Evidence) -> EvaluationRow:
    row = _row(cycle, candidate, basis, decide(evidence, cycle.config.gate))
    insert_evaluation(cycle.store, row)
    return row


def _incomplete(plan: Plan, measured: Measured) -> str:
    keys = plan.keys(plan.n)
    before, after = (sum(key in known for key in keys) for known in (measured.incumbent, measured.candidate))
    return (
        f"answers to held-out tasks are missing, there are {before} of {len(keys)} of the incumbent and {after} of the "
        "candidate: the evaluation set, the application or the settings of evaluation changed during the cycle; "
        "run a new cycle"
    )


def _row(cycle: Cycle, candidate: str, basis: Basis, decision: Decision) -> EvaluationRow:
    found = decision.numbers
    version = evaluation_sets.register(cycle.store, cycle.app.name, load_evaluation(cycle.app))
    return EvaluationRow(
        id=f"eval_{cycle.id.removeprefix('cycle_')}",
        cycle_id=cycle.id,
        candidate=candidate,
        incumbent=cycle.incumbent,
        set_digest=basis.set_digest,
        n=found.n,
        incumbent_success=found.incumbent_success,
        candidate_success=found.candidate_success,
        interval_low=found.interval.low,
        interval_high=found.interval.high,
        interval_level=found.interval.level,
        num_gained=found.num_gained,
        num_lost=found.num_lost,
        p_value=found.p_value,
        passed=decision.passed,
        reasons=decision.reasons,
        families=family_rows(found.families),
        set_version=version.version,
        protocol=basis.protocol,
        detectable=found.detectable,
        rules=decision.rules,
        sampled=decision.evidence.sampled,
        ability=decision.evidence.ability,
        judge=decision.evidence.judge,
        early_stop=decision.evidence.early_stop,
        notes=evaluation_sets.comparability(cycle.store, version, basis, cycle.id),
        thresholds={
            "gate": cycle.config.gate.model_dump(mode="json"),
            "evaluate": cycle.config.evaluate.model_dump(mode="json"),
        },
    )
