"""The promote stage: the gate's decision on the record, and what follows from it.

The decision is a row and a picture before anything changes. A candidate that passed becomes active, or waits
for an operator where configured; one that did not is marked rejected. A candidate is only promoted over the
incumbent that it was measured against: where operators moved the pointer meanwhile, the proof is about
something else. Every step may be repeated after a crash and then finds itself done.
"""

from __future__ import annotations

import asyncio
import logging

import nightschool

from nightschool_learner import records
from nightschool_learner.decision import recorded_decision
from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.plots import plot_evaluation
from nightschool_learner.sampling import patiently
from nightschool_learner.stages import Cycle, Ending

logger = logging.getLogger(__name__)


class PromoteStage:
    """Decides, records and acts; ends the cycle."""

    name = "promote"

    async def run(self, cycle: Cycle) -> Ending | None:
        candidate = records.candidate_of(cycle.store, cycle.id)
        assert candidate is not None, "the train stage registers a candidate"
        row = await recorded_decision(cycle, candidate)
        progress = cycle.progress(self.name)
        progress.begin(1, 0, {"rules": len(row.reasons), "rules_failed": len(failed_rules(row))})
        await asyncio.to_thread(plot_evaluation, row, cycle.folder / "plots")
        ending = await (self._accept(cycle, row) if row.passed else self._reject(cycle, row))
        progress.advance()
        progress.say(ending.outcome)
        logger.info(
            "event=gate cycle=%s candidate=%s passed=%s state=%s", cycle.id, candidate, row.passed, ending.state
        )
        return ending

    async def _accept(self, cycle: Cycle, row: EvaluationRow) -> Ending:
        active = await asyncio.to_thread(records.active_adapter, cycle.store)
        if active == row.candidate:
            return Ending("promoted", f"{row.candidate} is active: {numbers(row)}")
        if active != row.incumbent:
            return Ending(
                "stopped",
                f"{row.candidate} passed against {row.incumbent}, but {active} is active by now: not promoted; "
                f"`nightschool adapters promote {row.candidate}` if it is wanted; {numbers(row)}",
            )
        if cycle.config.promote.approval == "manual":
            return Ending(
                "stopped",
                f"{row.candidate} passed the gate and waits for approval: "
                f"`nightschool adapters promote {row.candidate}`; {numbers(row)}",
            )
        try:
            change = await patiently(
                cycle,
                lambda: cycle.client.admin.adapters.promote(
                    row.candidate, reason=f"cycle {cycle.id}: {numbers(row)}", request_id=f"promote-{cycle.id}"
                ),
            )
        except nightschool.FailedPreconditionError as error:
            return Ending("rejected", f"{row.candidate} passed the gate but the server refuses it: {error}")
        return Ending(
            "promoted", f"{row.candidate} replaced {row.incumbent} in {change.duration_s:.2f} s: {numbers(row)}"
        )

    async def _reject(self, cycle: Cycle, row: EvaluationRow) -> Ending:
        failed = "; ".join(failed_rules(row))
        try:
            await patiently(
                cycle,
                lambda: cycle.client.admin.adapters.reject(
                    row.candidate, reason=f"cycle {cycle.id}: {failed}", request_id=f"reject-{cycle.id}"
                ),
            )
        except nightschool.FailedPreconditionError as error:
            # An operator was quicker: deleted it, or promoted it by force. The decision stays on the record.
            logger.warning("event=reject_refused cycle=%s candidate=%s error=%s", cycle.id, row.candidate, error)
        return Ending("rejected", f"{row.candidate} did not pass: {failed}; {numbers(row)}")


def failed_rules(row: EvaluationRow) -> list[str]:
    """The rules that did not hold, without the word that says so."""
    return [reason.removeprefix("FAILED: ") for reason in row.reasons if reason.startswith("FAILED: ")]


def numbers(row: EvaluationRow) -> str:
    """The decision's numbers in one line."""
    what = "success" if row.judge is None else f"tasks won by {row.judge.name}"
    return (
        f"held-out {what} {row.incumbent_success:.1%} -> {row.candidate_success:.1%} (n {row.n}, "
        f"{row.interval_level:.0%} interval of the difference {row.interval_low * 100:+.1f} to "
        f"{row.interval_high * 100:+.1f} points, McNemar p {row.p_value:.2g})"
    )
