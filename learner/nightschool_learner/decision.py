"""The gate's decision on a cycle's candidate: gathered from the rows, made once, kept as a row.

Owns what `gate.decide` is given and how its answer becomes an `EvaluationRow`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from nightschool_server.app import load_evaluation
from nightschool_server.config.training import GateConfig
from nightschool_server.evaluation_set import EvaluationSet

from nightschool_learner import evaluation_sets
from nightschool_learner.comparison import Margin, compare, family_rows, paired
from nightschool_learner.diversity import sampled_numbers
from nightschool_learner.errors import StageFailedError
from nightschool_learner.evaluate import basis_of, draws_of, held_out_tasks
from nightschool_learner.evaluation_records import EvaluationRow, evaluation_of, insert_evaluation
from nightschool_learner.evaluation_results import GREEDY, Basis, Key, TaskResult, results_of
from nightschool_learner.gate import Decision, Evidence, decide
from nightschool_learner.stages import Cycle


async def recorded_decision(cycle: Cycle, candidate: str) -> EvaluationRow:
    """The gate's decision on the cycle's candidate, made once and read from its row afterwards."""
    known = await asyncio.to_thread(evaluation_of, cycle.store, cycle.id)
    if known is not None:
        return known
    held_out = await asyncio.to_thread(held_out_tasks, cycle)
    basis = await basis_of(cycle, held_out)
    return await asyncio.to_thread(_decided, cycle, candidate, held_out, basis)


def _decided(cycle: Cycle, candidate: str, held_out: EvaluationSet, basis: Basis) -> EvaluationRow:
    keys = [(task.id, draw) for task, draw in draws_of(cycle, held_out)]
    known = {name: results_of(cycle.store, basis, name) for name in (cycle.incumbent, candidate)}
    measured = {name: [results[key] for key in keys if key in results] for name, results in known.items()}
    if any(len(results) < len(keys) for results in measured.values()):
        raise StageFailedError(_incomplete(keys, measured))
    evidence = _evidence(cycle, measured[cycle.incumbent], measured[candidate])
    decision = decide(evidence, cycle.config.gate)
    row = _row(cycle, candidate, basis, decision)
    insert_evaluation(cycle.store, row)
    return row


def _evidence(cycle: Cycle, incumbent: list[TaskResult], candidate: list[TaskResult]) -> Evidence:
    limits, seed = cycle.config.gate, cycle.seed
    greedy = [[r for r in results if r.draw == GREEDY] for results in (incumbent, candidate)]
    return Evidence(
        compare(paired(*greedy), level=limits.interval_level, seed=seed, margin=margin_of(limits)),
        sampled_numbers(
            incumbent,
            candidate,
            temperature=cycle.config.evaluate.temperature,
            level=limits.interval_level,
            seed=seed,
        ),
    )


def margin_of(limits: GateConfig) -> Margin:
    """What counts as no worse."""
    return Margin(limits.non_inferiority_margin, limits.max_non_inferiority_p)


def _incomplete(keys: list[Key], measured: Mapping[str, list[TaskResult]]) -> str:
    counts = " and ".join(f"{len(results)} of {len(keys)} on {name}" for name, results in measured.items())
    return (
        f"answers to held-out tasks are missing, there are {counts}: the evaluation set, the application or "
        "the settings of evaluation changed during the cycle; run a new cycle"
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
        notes=evaluation_sets.comparability(cycle.store, version, basis, cycle.id),
        thresholds={
            "gate": cycle.config.gate.model_dump(mode="json"),
            "evaluate": cycle.config.evaluate.model_dump(mode="json"),
        },
    )
