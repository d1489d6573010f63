"""One step before its critic, behind the rows: what was compared or decided before is never paid for again.

Owns the rows of `critiques` (a judge's comparison in one order) and `duels` (who won, and which component decided).
A judge that ranks a whole step writes every pair of it at once.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from nightschool_learner.critics import Judge
from nightschool_learner.critique import Contender, Context, Critic, Duel, Verdict
from nightschool_learner.panel import Case, Panel
from nightschool_learner.prompts import CandidateView
from nightschool_learner.stages import Progress
from nightschool_learner.writer import Writer

Verdicts = dict[tuple[int, int], Verdict]
"""By (first, second) position."""
Duels = dict[tuple[int, int], Duel]
"""By (lower, higher) position."""

_VERDICT_COLUMNS = (
    "verdict, margin, raw, prompt_tokens, why, rubric, num_votes, num_cached, completion_tokens"  # as Verdict has them
)


@dataclass(frozen=True)
class Court:
    """What the steps of a cycle share where candidates are compared."""

    store: Store
    writer: Writer
    critic: Critic
    panel: Panel
    compared: Progress
    is_listwise: bool = False


class Comparer:
    """The duels of one step."""

    def __init__(
        self,
        court: Court,
        step_id: str,
        context: Context,
        views: Mapping[int, CandidateView],
        contenders: Sequence[Contender],
    ) -> None:
        self._court = court
        self._step_id = step_id
        self._verdicts = verdicts_of(court.store, step_id)
        self._duels = duels_of(court.store, step_id)
        self._case = Case(context, views, {c.position: c for c in contenders}, self._compare)

    async def meet(self, a: int, b: int) -> Duel:
        """The duel of the candidates at two positions."""
        a, b = sorted((a, b), key=lambda position: (-self._case.contenders[position].num_samples, position))
        key = (min(a, b), max(a, b))
        if key not in self._duels:
            began = time.monotonic()
            duel = await self._court.panel.decide(self._case, a, b)
            seconds = round(time.monotonic() - began, 3)
            await self._court.writer.write(lambda db: insert_duel(db, self._step_id, key, duel, seconds))
            self._duels[key] = duel
            counted = f"decided_by_{duel.component}" if duel.winner is not None else "undecided"
            self._court.compared.advance(0, **{counted: 1, "duels_ms": round(1000 * seconds)})
            if duel.why == "budget":
                self._court.compared.say("the critic's budget is spent: facts and free components decide the rest")
        return self._duels[key]

    async def _compare(self, first: int, second: int) -> Verdict:
        if (first, second) not in self._verdicts:
            critic = self._court.critic
            if self._court.is_listwise and isinstance(critic, Judge):
                await self._rank(critic)
            else:
                views = self._case.views
                verdict = await critic.compare(self._case.context, views[first], views[second])
                await self._keep({(first, second): verdict})
        return self._verdicts[first, second]

    async def _rank(self, judge: Judge) -> None:
        """Have all candidates that ran compared at once. What it took is booked on the first row."""
        positions = [c.position for c in self._case.contenders.values() if not c.failed]
        ranking = await judge.rank(self._case.context, [self._case.views[position] for position in positions])
        self._court.compared.advance(
            0,
            **{f"ranked_best_at_{at + 1}": n for at, n in ranking.position_wins().items()},
            rankings=len(ranking.orders),
        )
        verdicts = {
            (positions[i], positions[j]): ranking.verdict(i, j, judge.rubric)
            for i in range(len(positions))
            for j in range(len(positions))
            if i != j
        }
        first = next(iter(verdicts))
        verdicts[first] = ranking.with_costs(verdicts[first])
        await self._keep(verdicts)

    async def _keep(self, verdicts: Verdicts) -> None:
        new = {key: verdict for key, verdict in verdicts.items() if key not in self._verdicts}

        def write(db: sqlite3.Connection) -> None:
            for (first, second), verdict in new.items():
                insert_critique(db, self._step_id, first, second, verdict)

        await self._court.writer.write(write)
        self._verdicts |= new
        for verdict in new.values():
            self._court.compared.advance(
                1,
                **{f"verdict_{verdict.winner}": 1, "prompt_tokens": verdict.prompt_tokens},
                completion_tokens=verdict.completion_tokens,
                votes=verdict.num_votes,
                cached=verdict.num_cached,
            )


def insert_critique(db: sqlite3.Connection, step_id: str, first: int, second: int, verdict: Verdict) -> None:
    """Write one comparison; it is never paid for again."""
    db.execute(
        f"INSERT INTO critiques (id, step_id, first, second, created_at, {_VERDICT_COLUMNS}) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            new_id("crit"), step_id, first, second, time.time(), verdict.winner, verdict.margin_nats, verdict.raw,
            verdict.prompt_tokens, verdict.why, verdict.rubric, verdict.num_votes, verdict.num_cached,
            verdict.completion_tokens,
        ),
    )  # fmt: skip


def verdicts_of(store: Store, step_id: str) -> Verdicts:
    """A step's comparisons."""
    rows = store.query(f"SELECT first, second, {_VERDICT_COLUMNS} FROM critiques WHERE step_id = ?", (step_id,))
    return {(row["first"], row["second"]): _verdict(row) for row in rows}


def insert_duel(db: sqlite3.Connection, step_id: str, key: tuple[int, int], duel: Duel, seconds: float = 0.0) -> None:
    """Write who won a duel, and how long that took."""
    db.execute(
        "INSERT INTO duels (step_id, a, b, winner, why, margin, component, seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (step_id, *key, duel.winner, duel.why, duel.margin, duel.component, seconds),
    )


def duels_of(store: Store, step_id: str) -> Duels:
    """A step's duels."""
    return {
        (row["a"], row["b"]): duel_of(row) for row in store.query("SELECT * FROM duels WHERE step_id = ?", (step_id,))
    }


def duel_of(row: Mapping[str, Any]) -> Duel:
    """A row of `duels`."""
    return Duel(row["winner"], row["why"], row["margin"], row["component"])


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict(
        winner=row["verdict"],
        margin_nats=row["margin"],
        raw=row["raw"],
        prompt_tokens=row["prompt_tokens"],
        why=row["why"],
        rubric=row["rubric"],
        num_votes=row["num_votes"],
        num_cached=row["num_cached"],
        completion_tokens=row["completion_tokens"],
    )
