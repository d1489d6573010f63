"""The gate's judge, for applications without answers: whose final answer to a held-out task is better.

A judge is a `Critic` that compares two final answers. Facts come first: an answer beats none, equal answers are a tie,
and nobody is asked. Else the judge sees both orders and counts only where the same adapter wins both by a margin;
anything less is a tie. Every comparison is a row; a resumed cycle pays for none twice.

Whoever made the preferences must not also say whether learning from them helped: the judge is another model than the
training critic, or `gate.allow_training_critic` says on the record that it is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nightschool_server.app import EvaluationTask
from nightschool_server.config.roles import CriticConfig, RoleConfig
from nightschool_server.uninterrupted import uninterrupted

from nightschool_learner.comparison import ANSWERED
from nightschool_learner.critics import Judge
from nightschool_learner.critique import Context, Critic, Verdict, in_both_orders
from nightschool_learner.evaluation_results import GREEDY, Basis, TaskResult, results_of
from nightschool_learner.examiner import read_images
from nightschool_learner.parallel import for_each
from nightschool_learner.prompts import CandidateView
from nightschool_learner.roles import open_role
from nightschool_learner.sampling import AnswerSampler
from nightschool_learner.stages import Cycle
from nightschool_learner.statistics import Interval, paired_bootstrap
from nightschool_learner.verdict_cache import Spent

if TYPE_CHECKING:
    from nightschool_server.store.store import Store

CANDIDATE, INCUMBENT = 0, 1
"""The two answers' places."""

NOT_SAID = ("budget", "unavailable")
"""Why a verdict is none: nobody was asked, so a resumed cycle asks again."""

Winner = Literal["candidate", "incumbent", "none"]
WON, LOST, TIED = 1.0, 0.0, 0.5
"""A task's share for the candidate."""


@dataclass(frozen=True)
class JudgeResult:
    """What the judge said of all tasks."""

    name: str
    """Who judged."""
    is_training_critic: bool
    num_won: int
    num_lost: int
    num_tied: int
    """Equal answers, neither answered, or a judge that was not sure in both orders."""
    num_asked: int
    """Tasks on which the judge was asked; the others were decided by facts."""
    win_rate: float
    """(won + tied / 2) / n."""
    interval: Interval
    """Of the win rate; whole tasks are resampled."""
    first_rate: float
    """How often the answer that was shown first won; far from 1/2, position counts more than content."""
    prompt_tokens: int


@asynccontextmanager
async def open_judge(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Critic]:
    """The judge that `gate.judge` names. Raises StageFailedError where an endpoint cannot be used."""
    config = cycle.config.gate.judge
    asking = CriticConfig(
        rubric=config.rubric,
        votes=config.votes,
        max_comparisons=config.max_comparisons,
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
    )
    said = verdicts_of(cycle.store, cycle.id).values()
    spent = Spent(len(said), sum(verdict.prompt_tokens for verdict in said))
    async with open_role(cycle, "judge", config, sampler) as model:
        yield Judge(model, asking, spent=spent)


def judge_name(cycle: Cycle) -> str:
    """Who judges, as the record says it."""
    return _name(cycle, cycle.config.gate.judge)


def is_training_critic(cycle: Cycle) -> bool:
    """Whether the judge is the model that made the preferences."""
    critic = cycle.config.critic
    return "judge" in (*critic.kinds, *critic.vetoes) and judge_name(cycle) == _name(cycle, critic)


def judge_fault(cycle: Cycle) -> str:
    """Why the cycle's judge may not judge; empty where it may."""
    if not is_training_critic(cycle) or cycle.config.gate.allow_training_critic:
        return ""
    return (
        f"the held-out tasks have no answers, and the judge {judge_name(cycle)} is the training critic, which would "
        "confirm itself: name another one (learner.gate.judge.kind, .adapter, .endpoint), or set "
        "learner.gate.allow_training_critic = true, on the record"
    )


def _name(cycle: Cycle, role: RoleConfig) -> str:
    if role.kind == "endpoint":
        return f"{role.endpoint.model}@{role.endpoint.base_url}"
    return f"served/{cycle.adapter_of(role.adapter)}"


class Judging:
    """The judge behind the rows: a comparison that is there is never paid for again."""

    def __init__(self, cycle: Cycle, basis: Basis, candidate: str, critic: Critic) -> None:
        self._cycle = cycle
        self._basis = basis
        self._names = (candidate, cycle.incumbent)
        self._critic = critic

    async def judge(self, tasks: Sequence[EvaluationTask]) -> None:
        """Compare the answers to these tasks where facts do not decide, and write what the judge says."""
        store, known = self._cycle.store, verdicts_of(self._cycle.store, self._cycle.id)
        ours, theirs = (results_of(store, self._basis, name) for name in self._names)

        async def compare(task: EvaluationTask) -> None:
            answers = ours[task.id, GREEDY], theirs[task.id, GREEDY]
            if by_facts(*answers) is None:
                await self._both_orders(task, answers, known)

        await for_each(self._cycle, tasks, compare, self._cycle.config.evaluate.concurrency)

    async def _both_orders(
        self, task: EvaluationTask, answers: tuple[TaskResult, TaskResult], known: dict[tuple[str, bool], Verdict]
    ) -> None:
        images = await asyncio.to_thread(read_images, task)
        context = Context(task.prompt, tuple(images), (), images)
        views = [CandidateView(answer.answer, "") for answer in answers]

        async def ask(first: int, second: int) -> Verdict:
            key = (task.id, first == CANDIDATE)
            if key not in known:
                verdict = await self._critic.compare(context, views[first], views[second])
                if verdict.why in NOT_SAID:
                    return verdict
                await uninterrupted(asyncio.to_thread(insert_verdict, self._cycle.store, self._cycle.id, key, verdict))
                known[key] = verdict
            return known[key]

        await in_both_orders(CANDIDATE, INCUMBENT, ask, self._cycle.config.gate.judge.margin_nats)


def by_facts(candidate: TaskResult, incumbent: TaskResult) -> float | None:
    """The share that needs no judge; None where one is needed."""
    answered = [result.outcome == ANSWERED for result in (candidate, incumbent)]
    if answered == [True, True]:
        return TIED if _same(candidate.answer, incumbent.answer) else None
    return TIED if answered == [False, False] else WON if answered[0] else LOST


def share_of(forward: Verdict | None, backward: Verdict | None, margin_nats: float) -> float:
    """The candidate's share by the judge: won or lost where it is sure in both orders, else tied."""
    if forward is None or backward is None:
        return TIED
    if any(verdict.winner == "invalid" or verdict.won_by_nats < margin_nats for verdict in (forward, backward)):
        return TIED
    if (forward.winner, backward.winner) == ("first", "second"):
        return WON
    return LOST if (forward.winner, backward.winner) == ("second", "first") else TIED


def shares_of(cycle: Cycle, pairs: Sequence[tuple[TaskResult, TaskResult]]) -> dict[str, float]:
    """The candidate's share of every task, from (incumbent, candidate) results and the verdicts in the rows."""
    known = verdicts_of(cycle.store, cycle.id)
    shares: dict[str, float] = {}
    for incumbent, candidate in pairs:
        fact = by_facts(candidate, incumbent)
        forward, backward = (known.get((candidate.task_id, first)) for first in (True, False))
        share = share_of(forward, backward, cycle.config.gate.judge.margin_nats)
        shares[candidate.task_id] = share if fact is None else fact
    return shares


def judged(cycle: Cycle, shares: dict[str, float]) -> JudgeResult:
    """The judge's result on these tasks."""
    verdicts = {key: v for key, v in verdicts_of(cycle.store, cycle.id).items() if key[0] in shares}
    clear = [verdict for verdict in verdicts.values() if verdict.winner != "invalid"]
    values = list(shares.values())
    limits = cycle.config.gate
    return JudgeResult(
        name=judge_name(cycle),
        is_training_critic=is_training_critic(cycle),
        num_won=values.count(WON),
        num_lost=values.count(LOST),
        num_tied=values.count(TIED),
        num_asked=len({task_id for task_id, _ in verdicts}),
        win_rate=sum(values) / len(values),
        interval=paired_bootstrap([0.0] * len(values), values, seed=cycle.seed, level=limits.interval_level),
        first_rate=sum(v.winner == "first" for v in clear) / len(clear) if clear else 0.5,
        prompt_tokens=sum(verdict.prompt_tokens for verdict in verdicts.values()),
    )


def verdicts_of(store: Store, cycle_id: str) -> dict[tuple[str, bool], Verdict]:
    """What the judge said in this cycle, by task and whether the candidate was shown first."""
    found: dict[tuple[str, bool], Verdict] = {}
    for row in store.query("SELECT * FROM evaluation_judgements WHERE cycle_id = ?", (cycle_id,)):
        first = bool(row["candidate_first"])
        margin = row["margin"] if first else -row["margin"]
        winner: Literal["first", "second", "invalid"] = "invalid"
        if row["winner"] != "none":
            winner = "first" if (row["winner"] == "candidate") == first else "second"
        found[row["task_id"], first] = Verdict(winner, margin, row["raw"], row["prompt_tokens"])
    return found


def insert_verdict(store: Store, cycle_id: str, key: tuple[str, bool], verdict: Verdict) -> None:
    """Write one comparison; one that is there already stays."""
    task_id, first = key
    winner: Winner = "none"
    if verdict.winner != "invalid":
        winner = "candidate" if (verdict.winner == "first") == first else "incumbent"
    margin = verdict.margin_nats if first else -verdict.margin_nats
    with store.transaction() as db:
        db.execute(
            "INSERT OR IGNORE INTO evaluation_judgements (cycle_id, task_id, candidate_first, winner, margin, raw, "
            "prompt_tokens, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (cycle_id, task_id, int(first), winner, margin, verdict.raw, verdict.prompt_tokens, time.time()),
        )


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()) == " ".join(other.split())
