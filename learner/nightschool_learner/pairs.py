"""Preference pairs from decided steps: the pick against each candidate that surely lost.

A chosen step never has a failure. A rival that ran makes a pair only where it lost its duel
with the pick (see `panel.py`); a rival that failed makes a pair by fact, and such pairs are capped, because
they teach format more than judgement (METHOD.md: the public code keeps mostly those). Steps that fell
back or agreed make none. A pair that rests on what a simulator gave back is kept out unless configured.
What a pair is trained on is exactly what was sampled.

Owns the selection (pure) and the stage that writes `pairs` rows; the trainer's file is `pair_export.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nightschool_server.agent.formats import TOOL_CALLS, ActionFormat, action_format
from nightschool_server.config.practice import PairsConfig
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from nightschool_learner import practice_records
from nightschool_learner.anchors import select_anchors
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.feedback_rows import write_feedback_files
from nightschool_learner.length_matching import Lengths, stretched
from nightschool_learner.pair_export import export_rows, write_anchors_file, write_pairs_file
from nightschool_learner.practice_records import REFUSED, CandidateRow, DecidedStep
from nightschool_learner.replay import replayed_rows
from nightschool_learner.stages import Cycle, Ending

MIN_TO_MATCH = 16
"""Of fewer pairs the ratio of lengths is chance, and matching it would leave out what there is."""

Kind = Literal["both_ran", "ran_vs_failed"]


@dataclass(frozen=True)
class Pair:
    """One preference, by candidate ids."""

    step_id: str
    task_id: str
    tool: str
    """The tool that the chosen step calls first; empty for a final answer."""
    chosen: str
    rejected: str
    kind: Kind
    margin: float
    """Of the duel (for a judge: nats, the smaller of both orders); 0 where facts decided."""
    key: tuple[str, str, str]
    """Conversation, chosen and rejected text, normalised: what makes two pairs near duplicates."""
    simulated: bool
    """Whether it rests on an observation that a simulator gave."""
    lead: float
    """Nats by which the policy, untempered, gives the chosen answer before the rejected one."""
    num_tokens: Lengths
    """Of the chosen and of the rejected answer."""
    is_alike: bool
    """Whether both ran, and both answer or both call: only then is one longer in words and not in kind."""


@dataclass(frozen=True)
class Selection:
    """The pairs to train on and how many were left out, by reason."""

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int]


def pairs_of(step: DecidedStep, written: ActionFormat = TOOL_CALLS) -> list[Pair]:
    """Every pair that the step supports, surest first; of equals the one that was sampled earlier."""
    if step.step.picked_by not in ("facts", "critic") or step.step.picked is None:
        return []
    by_position = {c.position: c for c in step.candidates}
    chosen = by_position[step.step.picked]
    assert not chosen.failure, f"step {step.step.id} picked a candidate that failed: {chosen.failure}"
    found: list[Pair] = []
    for rival in step.candidates:
        if rival.position == chosen.position or rival.failure == REFUSED:
            continue
        margin = 0.0 if rival.failure else _margin_over(rival, chosen, step)
        if margin is None:
            continue
        kind: Kind = "ran_vs_failed" if rival.failure else "both_ran"
        found.append(_pair(step, rival, kind, margin, written))
    return sorted(found, key=lambda p: -p.margin)


def select(
    steps: Sequence[DecidedStep], config: PairsConfig, seed: int, written: ActionFormat = TOOL_CALLS
) -> Selection:
    """Apply the caps; which pairs go where a cap bites is drawn from `seed`."""
    dropped: Counter[str] = Counter()
    supported = [pairs_of(step, written) for step in steps]
    usable = [[pair for pair in pairs if not _unusable(pair, config)] for pairs in supported]
    dropped.update(_unusable(pair, config) for pairs in supported for pair in pairs)
    del dropped[""]
    supply = [pair for pairs in usable for pair in pairs[: config.max_per_step]]
    dropped["step_cap"] = sum(map(len, usable)) - len(supply)
    random.Random(seed).shuffle(supply)
    per_task: Counter[str] = Counter()
    per_tool: Counter[str] = Counter()
    keys: set[tuple[str, str, str]] = set()
    kept: list[Pair] = []
    for pair in sorted(supply, key=lambda p: p.kind):  # stable: those that both ran come first
        if pair.key in keys or pair.key[1] == pair.key[2]:
            dropped["near_duplicate"] += 1
        elif per_task[pair.task_id] >= config.max_per_task:
            dropped["task_cap"] += 1
        elif per_tool[pair.tool] >= config.max_per_tool:
            dropped["tool_cap"] += 1
        else:
            keys.add(pair.key)
            per_task[pair.task_id] += 1
            per_tool[pair.tool] += 1
            kept.append(pair)
    matched = _match_lengths(kept, config.max_length_ratio)
    dropped["length"] = len(kept) - len(matched)
    capped = _cap_failed(matched, config.max_share_failed)
    dropped["failed_cap"] = len(matched) - len(capped)
    return Selection(tuple(capped), {reason: count for reason, count in dropped.items() if count})


@dataclass(frozen=True)
class PairsStage:
    """Writes the cycle's pairs in one transaction, then the trainer's files: the pairs and their anchors."""

    steps_of: Callable[[Store, str], Sequence[DecidedStep]] = practice_records.decided_steps
    """The steps of a cycle that pairs are made of."""
    name: str = "pairs"

    async def run(self, cycle: Cycle) -> Ending | None:
        config = cycle.config.pairs
        written = action_format(cycle.agent)
        selection = select(self.steps_of(cycle.store, cycle.id), config, cycle.seed, written)
        rows = [
            (new_id("pair"), cycle.id, p.step_id, p.chosen, p.rejected, p.kind, p.margin, time.time())
            for p in selection.pairs
        ]
        with cycle.store.transaction() as db:
            practice_records.insert_pairs(db, rows)
        counts = Counter(pair.kind for pair in selection.pairs) + Counter(
            {f"dropped_{k}": v for k, v in selection.dropped.items()}
        )
        agreed = practice_records.agreed_steps(cycle.store, cycle.id)
        sound = [step for step in agreed if config.train_on_simulated or not step.simulated]
        anchors = select_anchors(
            sound,
            round(config.anchors_per_pair * len(selection.pairs)),
            config=config,
            seed=cycle.seed,
            action_format=written,
        )
        counts["anchors"] = len(anchors)
        if len(sound) < len(agreed):
            counts["anchors_dropped_simulated"] = len(agreed) - len(sound)
        # In a thread: every rated request's pictures are looked at.
        counts.update(await asyncio.to_thread(write_feedback_files, cycle))
        replayed = await replayed_rows(cycle, export_rows(cycle.store, cycle.id))
        counts.update({"replayed": len(replayed)} if replayed else {})
        progress = cycle.progress(self.name)
        progress.begin(len(selection.pairs), len(selection.pairs), counts)
        if len(selection.pairs) < config.min_pairs:
            raise NothingToLearnError(
                f"{len(selection.pairs)} preference pairs, fewer than learner.pairs.min_pairs = {config.min_pairs}: "
                "the candidates agree, or the critic abstains; see the counts of explore and critique"
            )
        write_anchors_file(cycle, anchors)
        write_pairs_file(cycle, replayed)
        return None


def _pair(step: DecidedStep, rejected: CandidateRow, kind: Kind, margin: float, written: ActionFormat) -> Pair:
    chosen = next(c for c in step.candidates if c.position == step.step.picked)
    return Pair(
        step_id=step.step.id,
        task_id=step.task_id,
        tool=written.tool_of(chosen.text),
        chosen=chosen.id,
        rejected=rejected.id,
        kind=kind,
        margin=margin,
        key=(step.step.history, _normal(chosen.text), _normal(rejected.text)),
        simulated=step.step.simulated or chosen.simulated or rejected.simulated,
        lead=chosen.logprob - rejected.logprob,
        num_tokens=(len(chosen.token_ids), len(rejected.token_ids)),
        is_alike=not rejected.failure and chosen.final == rejected.final,
    )


def _margin_over(rival: CandidateRow, chosen: CandidateRow, step: DecidedStep) -> float | None:
    """By how much `chosen` won its duel with `rival`; None where it did not."""
    a, b = sorted((rival.position, chosen.position))
    duel = step.duels.get((a, b))
    return duel.margin if duel is not None and duel.winner == chosen.position else None


def _unusable(pair: Pair, config: PairsConfig) -> str:
    """Why a pair is not trained on, whatever the caps leave; empty where it may be."""
    if pair.simulated and not config.train_on_simulated:
        return "simulated"
    if config.max_lead_nats and pair.lead > config.max_lead_nats:
        return "settled"
    return ""


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _match_lengths(pairs: Sequence[Pair], max_ratio: float) -> list[Pair]:
    """Leave out alike pairs until their chosen answers are as long as the rejected ones, within `max_ratio`."""
    alike = [pair for pair in pairs if pair.is_alike]
    if len(alike) < MIN_TO_MATCH:
        return list(pairs)
    left_out = {alike[index].key for index in stretched([pair.num_tokens for pair in alike], max_ratio)}
    return [pair for pair in pairs if pair.key not in left_out]


def _cap_failed(pairs: Sequence[Pair], max_share: float) -> list[Pair]:
    """Keep pairs against failed candidates while they are at most `max_share` of what is kept."""
    both_ran = [p for p in pairs if p.kind == "both_ran"]
    failed = [p for p in pairs if p.kind == "ran_vs_failed"]
    allowed = len(failed) if max_share >= 1 else int(len(both_ran) * max_share / (1 - max_share) + 1e-9)
    return both_ran + failed[:allowed]
