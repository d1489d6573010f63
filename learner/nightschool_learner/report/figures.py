"""Numbers of a cycle, out of its rows: the cycle and its stages, the funnel, practice, the critic, tokens.

Reads only. Where a stage counted something that no row keeps (requests that were not chosen), its counts say it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nightschool_server.store.store import Store

from nightschool_learner import practice_counts, records
from nightschool_learner.coverage import coverage_of
from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.report.contents import (
    CriticFigures,
    CycleFacts,
    FunnelStep,
    LeftOut,
    PracticeFigures,
    StageFacts,
    TokenUse,
)
from nightschool_learner.report.words import words_of

_STEPS = "SELECT s.id FROM steps s JOIN rollouts r ON r.id = s.rollout_id WHERE r.cycle_id = ?"

_FUNNEL = {
    "seeds": "SELECT COUNT(*) AS n FROM cycle_seeds WHERE cycle_id = ?",
    "slots": "SELECT COUNT(*) AS n FROM tasks WHERE cycle_id = ?",
    "tasks_kept": "SELECT COUNT(*) AS n FROM tasks WHERE cycle_id = ? AND state = 'kept'",
    "rollouts": "SELECT COUNT(*) AS n FROM rollouts WHERE cycle_id = ?",
    "steps": f"SELECT COUNT(*) AS n FROM ({_STEPS})",
    "steps_decided": f"SELECT COUNT(*) AS n FROM ({_STEPS} AND s.picked_by IN ('facts', 'critic'))",
    "pairs": "SELECT COUNT(*) AS n FROM pairs WHERE cycle_id = ?",
}


def cycle_facts(store: Store, cycle_id: str) -> CycleFacts:
    """The cycle's row."""
    row = store.query(f"SELECT {', '.join(CycleFacts.__dataclass_fields__)} FROM cycles WHERE id = ?", (cycle_id,))[0]
    return CycleFacts(**row | {"overrides": tuple(json.loads(row["overrides"]))})


def stage_facts(store: Store, cycle_id: str) -> tuple[StageFacts, ...]:
    """Every stage with its counts and seconds."""
    return tuple(
        StageFacts(**stage, seconds=_seconds(stage["started_at"], stage["ended_at"]))
        for stage in records.stage_report(store, cycle_id)
    )


def funnel_counts(store: Store, cycle_id: str) -> dict[str, int]:
    """How many of each there are, from the rows."""
    return {name: int(store.query(sql, (cycle_id,))[0]["n"]) for name, sql in _FUNNEL.items()}


def funnel_steps(counts: Mapping[str, int], stages: Sequence[StageFacts], figures: PracticeFigures) -> list[FunnelStep]:
    """The way from logged requests to what was trained on, as far as the cycle came."""
    by_name = {stage.name: stage for stage in stages}
    of_seeds, of_tasks, of_pairs, of_training = (
        by_name[name].counts if name in by_name else {} for name in ("seeds", "synthesize", "pairs", "train")
    )
    num_undecided = counts["steps"] - counts["steps_decided"]
    undecided = {key: n for key, n in figures.picked_by.items() if key in ("agreed", "fallback")}
    dropped_tasks = tuple(_left_out(of_tasks))
    steps = [
        _step("seeds", "logged requests chosen", counts["seeds"], _left_out(of_seeds)),
        FunnelStep("synthesize", "new tasks written", counts["tasks_kept"], counts["slots"], dropped_tasks),
        FunnelStep("explore", "tasks practised", counts["rollouts"], counts["tasks_kept"], ()),
        FunnelStep(
            "critique", "steps with a sure winner", counts["steps_decided"], counts["steps"],
            tuple(_reasons(undecided)) if num_undecided else (),
        ),
        _step("pairs", "preference pairs", counts["pairs"], _left_out(of_pairs)),
    ]  # fmt: skip
    if "pairs" in of_training:
        steps.append(_step("train", "pairs trained on", of_training["pairs"], _left_out(of_training)))
    return [step for step in steps if step.num or step.of or by_name.get(step.stage, _NONE).state != "pending"]


_NONE = StageFacts("", "pending", 0, 0, {}, "", None, None, None)


def practice_figures(store: Store, cycle_id: str, stages: Sequence[StageFacts]) -> PracticeFigures:
    """What was tried, from the rows; how long that took, from the stage's counts."""
    counts = practice_counts.explore_counts(store, cycle_id)
    clocks = next((stage.counts for stage in stages if stage.name == "explore"), {})
    outcomes = store.query(
        "SELECT outcome, COUNT(*) AS n FROM rollouts WHERE cycle_id = ? AND state <> 'running' GROUP BY outcome",
        (cycle_id,),
    )
    return PracticeFigures(
        num_samples=counts["samples"],
        num_actions=counts["distinct_actions"],
        by_position=practice_counts.position_figures(store, cycle_id),
        coverage=coverage_of(store, cycle_id),
        picked_by=_named(counts, "picked_by_"),
        failures=_named(counts, "failed_"),
        outcomes={row["outcome"]: int(row["n"]) for row in outcomes},
        wall_s=clocks["wall_ms"] / 1000 if "wall_ms" in clocks else None,
        asking_share=_share(clocks, "asking_ms", "wall_ms"),
        engine_busy_share=_share(clocks, "busy_ms", "watched_ms"),
    )


def critic_figures(store: Store, cycle_id: str, stages: Sequence[StageFacts], num_pairs: int) -> CriticFigures:
    """What the critic did, from the rows; steps without a reason in their row are counted as the stage counted them."""
    counts = practice_counts.critique_counts(store, cycle_id)
    logged = next((stage.counts for stage in stages if stage.name == "critique"), {})
    duels = store.query(f"SELECT winner, why, component FROM duels WHERE step_id IN ({_STEPS})", (cycle_id,))
    longer = store.query(
        "SELECT SUM(length(w.text) > length(l.text)) AS longer, SUM(length(w.text) < length(l.text)) AS shorter "
        "FROM duels d JOIN candidates w ON w.step_id = d.step_id AND w.position = d.winner "
        "JOIN candidates l ON l.step_id = d.step_id AND l.position = d.a + d.b - d.winner "
        f"WHERE d.component <> 'facts' AND w.final = l.final AND d.step_id IN ({_STEPS})",
        (cycle_id,),
    )[0]
    orders = store.query(
        "SELECT COALESCE(SUM(c.verdict = 'first'), 0) AS first, COALESCE(SUM(c.verdict = 'second'), 0) AS second "
        "FROM critiques c JOIN critiques r ON r.step_id = c.step_id AND r.first = c.second AND r.second = c.first "
        f"WHERE c.verdict <> 'invalid' AND r.verdict <> 'invalid' AND c.step_id IN ({_STEPS})",
        (cycle_id,),
    )[0]
    rubrics = store.query(f"SELECT DISTINCT rubric FROM critiques WHERE step_id IN ({_STEPS})", (cycle_id,))
    return CriticFigures(
        num_comparisons=practice_counts.num_critiques(store, cycle_id),
        num_first_won=int(orders["first"]),
        num_second_won=int(orders["second"]),
        num_invalid=counts.get("verdict_invalid", 0),
        num_duels=len(duels),
        decided_by=_sorted(Counter(d["component"] for d in duels if d["winner"] is not None)),
        undecided=_sorted(Counter(d["why"] for d in duels if d["winner"] is None)),
        abstentions=_named(counts, "abstained_") or _named(logged, "abstained_"),
        num_longer_won=int(longer["longer"] or 0),
        num_shorter_won=int(longer["shorter"] or 0),
        num_votes=counts["votes"],
        num_cached=counts["cached"],
        prompt_tokens=counts["prompt_tokens"],
        completion_tokens=counts["completion_tokens"],
        seconds=(seconds := counts.get("duels_ms", 0) / 1000),
        rubrics=tuple(sorted(row["rubric"] for row in rubrics if row["rubric"])),
        tokens_per_pair=(counts["prompt_tokens"] + counts["completion_tokens"]) / num_pairs if num_pairs else None,
        seconds_per_pair=seconds / num_pairs if num_pairs else None,
    )


def token_uses(stages: Sequence[StageFacts], critic: CriticFigures, row: EvaluationRow | None) -> tuple[TokenUse, ...]:
    """Tokens by role, as the stages counted them."""
    counts = {stage.name: stage.counts for stage in stages}
    written = counts.get("synthesize", {})
    uses = (
        TokenUse("writer", "writing tasks", written.get("tokens", 0), None),
        TokenUse("captioner", "saying what pictures show", written.get("captioner_tokens", 0), None),
        TokenUse("file_maker", "making files", written.get("file_maker_tokens", 0), None),
        TokenUse("verifier", "looking at tasks with their files", written.get("verifier_tokens", 0), None),
        TokenUse("probe", "quick attempts at tasks", written.get("probe_tokens", 0), None),
        TokenUse("practice", "trying actions", counts.get("explore", {}).get("tokens", 0), None),
        TokenUse("critic", "comparing", critic.completion_tokens, critic.prompt_tokens),
        TokenUse("evaluation", "test tasks", counts.get("evaluate", {}).get("completion_tokens", 0), None),
        TokenUse("judge", "judging answers to test tasks", 0, row.judge.prompt_tokens if row and row.judge else None),
    )
    return tuple(use for use in uses if use.written or use.read)


def _step(stage: str, title: str, num: int, left_out: Sequence[LeftOut]) -> FunnelStep:
    return FunnelStep(stage, title, num, num + sum(one.num for one in left_out), tuple(left_out))


def _left_out(counts: Mapping[str, int]) -> list[LeftOut]:
    return _reasons(_named(counts, "dropped_"))


def _reasons(counts: Mapping[str, int]) -> list[LeftOut]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [LeftOut(reason, words_of(reason), num) for reason, num in ranked if num]


def _named(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {key.removeprefix(prefix): n for key, n in counts.items() if key.startswith(prefix)}


def _sorted(counts: Mapping[Any, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _share(counts: Mapping[str, int], part: str, whole: str) -> float | None:
    return counts.get(part, 0) / counts[whole] if counts.get(whole) else None


def _seconds(start: float | None, end: float | None) -> float | None:
    return round(end - start, 3) if start and end else None
