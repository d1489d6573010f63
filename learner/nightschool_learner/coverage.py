"""What there is to learn from a cycle's practice, before anything is trained on it.

Training on one's own samples moves mass to what the model can tell apart but does not yet do first ("sharpening",
arXiv 2412.01951). So it needs several samples to find more than one does, and somebody who knows which is better: both
are read from the rows here. Which action is right nobody knows in practice; the best known one stands for it. A step
counts as judged where facts or the critic decided it, where all samples agree on an action that ran (taken as right),
and where everything failed (nothing was right). Steps of which nobody was sure are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightschool_server.store.store import Store

_STEPS = (
    "SELECT s.picked_by, s.abstention, COUNT(*) AS num_actions, SUM(c.num_samples) AS num_samples, "
    "MAX(c.num_samples) AS most, SUM(c.num_samples * (c.position = s.picked)) AS num_picked, "
    "MAX(CASE WHEN c.position = s.picked THEN c.failure END) AS failure "
    "FROM steps s JOIN rollouts r ON r.id = s.rollout_id JOIN candidates c ON c.step_id = s.id "
    "WHERE r.cycle_id = ? GROUP BY s.id"
)
_MARGIN = (
    "SELECT AVG(d.margin) AS margin FROM duels d JOIN steps s ON s.id = d.step_id "
    "JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ? AND d.component = 'judge' AND d.winner = s.picked"
)


@dataclass(frozen=True)
class Coverage:
    """How much more several samples find than one, and how surely the critic tells."""

    num_steps: int
    num_steps_with_choice: int
    """Not all samples agreed: only there is something to learn."""
    choice_share: float
    """Of all steps; 0 where there is none."""
    mean_actions: float
    """Distinct actions of a step."""
    num_judged: int
    pass_at_1: float | None
    """Share of judged steps that one sample takes the best known action of; None where none was judged."""
    pass_at_n: float | None
    """Share of judged steps for which one of the samples does."""
    num_decided: int
    """By facts or the critic."""
    num_overruled: int
    """Of them: the pick is not what most samples did."""
    mean_margin_nats: float | None
    """By which the critic's picks won their duels; None where it judged none."""

    def __str__(self) -> str:
        """A line for operators."""
        said = f"{self.choice_share:.1%} of {self.num_steps} steps had a choice, {self.mean_actions:.2f} actions a step"
        if self.pass_at_1 is not None and self.pass_at_n is not None:
            said += f"; pass@1 {self.pass_at_1:.1%}, pass@n {self.pass_at_n:.1%} of {self.num_judged} judged steps"
        return said


def coverage_of(store: Store, cycle_id: str) -> Coverage:
    """The coverage of a cycle's steps so far."""
    rows = store.query(_STEPS, (cycle_id,))
    sure = [row for row in rows if row["picked_by"] in ("facts", "critic", "agreed")]
    failed = [row for row in rows if row["abstention"] == "all_failed" and row["failure"] != "refused"]
    decided = [row for row in sure if row["picked_by"] != "agreed"]
    num_judged = len(sure) + len(failed)
    num_with_choice = sum(row["num_actions"] > 1 for row in rows)
    return Coverage(
        num_steps=len(rows),
        num_steps_with_choice=num_with_choice,
        choice_share=num_with_choice / len(rows) if rows else 0.0,
        mean_actions=sum(row["num_actions"] for row in rows) / len(rows) if rows else 0.0,
        num_judged=num_judged,
        pass_at_1=sum(row["num_picked"] / row["num_samples"] for row in sure) / num_judged if num_judged else None,
        pass_at_n=len(sure) / num_judged if num_judged else None,
        num_decided=len(decided),
        num_overruled=sum(row["num_picked"] < row["most"] for row in decided),
        mean_margin_nats=store.query(_MARGIN, (cycle_id,))[0]["margin"],
    )
