"""The audit: the critic decides the gold set's pairs as it would a step's, and its answers are counted.

A cycle whose critic has enough gold is audited before it explores, and stopped where it fails its floors: nothing is
trained on the word of a critic that is known to be wrong. Answers are cached by content, so an unchanged critic is
asked once. Owns the asking and the row of `audits`; the numbers are `agreement.py`'s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nightschool_server.chat import canonical_json
from nightschool_server.errors import AppError
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from nightschool_learner.agreement import Agreement, Judged, faults_of, measure, position_faults
from nightschool_learner.critique import Contender, Critic, Verdict
from nightschool_learner.errors import StageFailedError
from nightschool_learner.gold import Better, GoldPair, labelled_pairs, read_gold
from nightschool_learner.panel import Case, Panel
from nightschool_learner.parallel import for_each
from nightschool_learner.stages import Cycle, Ending
from nightschool_learner.statistics import wilson

CONCURRENCY = 16
"""Gold pairs in flight."""

_SIDES: tuple[Better, Better] = ("a", "b")


@dataclass(frozen=True)
class Audit:
    """What came of one."""

    agreement: Agreement
    faults: tuple[str, ...]
    judged: tuple[Judged, ...]
    num_tokens: int
    """Paid for, of prompts and answers."""
    num_cached: int
    duration_s: float

    def to_json(self) -> dict[str, Any]:
        """For `--json`, the row and the report; single pairs left out."""
        value = {key: each for key, each in asdict(self).items() if key != "judged"}
        value["agreement"] |= {"rate": self.agreement.rate, "against_paper": self.agreement.against_paper}
        return value


@dataclass(frozen=True)
class AnswerCounts:
    """What the critic answered in a cycle's own comparisons."""

    num_asked: int
    num_unreadable: int
    num_both: int
    """Readable answers to questions that were asked in the other order, too, and answered readably."""
    num_first: int
    """Of these, those for the candidate shown first."""


def gold_of(cycle: Cycle, path: Path | None = None) -> list[GoldPair]:
    """The gold set: `path`, or the application's file, and what people labelled. Raises AppError."""
    path = path or (Path(cycle.app.gold) if cycle.app.gold is not None else None)
    return [*(read_gold(path) if path is not None else ()), *labelled_pairs(cycle.store)]


async def audit(cycle: Cycle, critic: Critic, panel: Panel, gold: Sequence[GoldPair]) -> Audit:
    """Have the critic decide every pair, both orders always asked."""
    started = time.monotonic()
    examined: dict[str, tuple[Judged, list[Verdict]]] = {}

    async def examine(pair: GoldPair) -> None:
        examined[pair.id] = await _examine(critic, panel, pair)

    await for_each(cycle, gold, examine, CONCURRENCY)
    judged = tuple(examined[pair.id][0] for pair in gold)
    verdicts = [verdict for _, asked in examined.values() for verdict in asked]
    agreement = measure(judged)
    return Audit(
        agreement,
        tuple(faults_of(agreement, cycle.config.critic)),
        judged,
        sum(verdict.prompt_tokens + verdict.completion_tokens for verdict in verdicts),
        sum(verdict.num_cached for verdict in verdicts),
        round(time.monotonic() - started, 3),
    )


async def _examine(critic: Critic, panel: Panel, pair: GoldPair) -> tuple[Judged, list[Verdict]]:
    views = {0: pair.a, 1: pair.b}
    orders = ((0, 1), (1, 0))
    asked = [await critic.compare(pair.context, views[first], views[second]) for first, second in orders]
    verdicts = dict(zip(orders, asked, strict=True))

    async def compare(first: int, second: int) -> Verdict:
        return verdicts[first, second]

    contenders = {position: Contender(position, 1, 0.0, False) for position in views}
    duel = await panel.decide(Case(pair.context, views, contenders, compare), 0, 1)
    readable = [verdict for verdict in asked if verdict.winner != "invalid"]
    forward, backward = asked
    judged = Judged(
        id=pair.id,
        better=pair.better,
        said=None if duel.winner is None else _SIDES[duel.winner],
        why=duel.why,
        component=duel.component,
        margin_of_a=(forward.margin_nats - backward.margin_nats) / 2 if len(readable) == 2 else None,
        chars_a_over_b=len(pair.a.action) - len(pair.b.action),
        first_won=tuple(verdict.winner == "first" for verdict in readable),
        num_unreadable=sum(verdict.winner == "invalid" and verdict.why in ("", "malformed") for verdict in asked),
    )
    return judged, asked


async def audit_cycle(cycle: Cycle, critic: Critic, panel: Panel) -> Ending | None:
    """Audit the cycle's critic once, where there is enough gold. An Ending where it fails its floors."""
    config = cycle.config.critic
    if cycle.config.fault_injection.invert_critic or not config.min_agreement:
        return None  # A sabotaged critic is let through on purpose: the gate is to catch what it taught.
    known = latest_audit(cycle.store, cycle.id)
    if known is None:
        try:
            gold = await asyncio.to_thread(gold_of, cycle)
        except AppError as error:
            raise StageFailedError(str(error)) from error
        if len(gold) < config.min_gold:
            return None
        found = await audit(cycle, critic, panel, gold)
        await asyncio.to_thread(insert_audit, cycle.store, cycle.id, found)
        known = found.to_json()
    return _stopped(known["faults"])


def check_answers(cycle: Cycle) -> Ending | None:
    """The floors that need no gold, over the cycle's own comparisons. An Ending where the critic fails them."""
    config, counts = cycle.config.critic, count_answers(cycle.store, cycle.id)
    if counts.num_asked < config.min_gold:
        return None
    # Only where both orders were asked: the first is always asked, and its first candidate is the likelier one.
    first = wilson(counts.num_first, counts.num_both) if counts.num_both >= config.min_gold else None
    return _stopped(position_faults(first, counts.num_unreadable / counts.num_asked, config))


def count_answers(store: Store, cycle_id: str) -> AnswerCounts:
    """What a cycle's critic answered, from the rows."""
    row = store.query(
        "SELECT COUNT(*) AS n, COALESCE(SUM(c.verdict = 'invalid' AND c.why IN ('', 'malformed')), 0) AS unreadable, "
        " COALESCE(SUM(r.id IS NOT NULL AND c.verdict <> 'invalid' AND r.verdict <> 'invalid'), 0) AS both, "
        " COALESCE(SUM(r.id IS NOT NULL AND r.verdict <> 'invalid' AND c.verdict = 'first'), 0) AS first "
        "FROM critiques c LEFT JOIN critiques r ON r.step_id = c.step_id AND r.first = c.second AND r.second = c.first "
        "JOIN steps s ON s.id = c.step_id JOIN rollouts o ON o.id = s.rollout_id WHERE o.cycle_id = ?",
        (cycle_id,),
    )[0]
    return AnswerCounts(int(row["n"]), int(row["unreadable"]), int(row["both"]), int(row["first"]))


def insert_audit(store: Store, cycle_id: str | None, audit: Audit) -> None:
    """Write an audit; None for one by hand."""
    with store.transaction() as db:
        db.execute(
            "INSERT INTO audits (id, cycle_id, numbers, created_at) VALUES (?, ?, ?, ?)",
            (new_id("audit"), cycle_id, canonical_json(audit.to_json()), time.time()),
        )


def latest_audit(store: Store, cycle_id: str) -> dict[str, Any] | None:
    """The audit of a cycle, as `Audit.to_json` gives it."""
    row = store.one("SELECT numbers FROM audits WHERE cycle_id = ? ORDER BY created_at DESC LIMIT 1", (cycle_id,))
    return None if row is None else dict(json.loads(row["numbers"]))


def _stopped(faults: Sequence[str]) -> Ending | None:
    if not faults:
        return None
    return Ending("stopped", f"the critic is not to be trusted: {'; '.join(faults)}; see `nightschool critic audit`")
