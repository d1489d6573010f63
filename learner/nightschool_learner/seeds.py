"""Seeds: the live requests that a cycle learns from.

A seed is a logged request whose caller allows training (`policy = 'train'`), answered, with one user
turn, not of a reserved session, not a held-out task. Duplicates are one seed; failures come first, because
that is where there is something to learn. Practice traffic is NO_LOG and therefore never a seed.

Owns the choice (pure) and the stage that writes `cycle_seeds`, once for a cycle, in one transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nightschool_server.config.practice import SeedsConfig

from nightschool_learner import seed_records
from nightschool_learner.contamination import held_out_of
from nightschool_learner.errors import NothingToLearnError
from nightschool_learner.screening import HeldOut, TaskKey, task_key
from nightschool_learner.seed_records import LoggedRequest, Seed
from nightschool_learner.stages import Cycle, Ending


@dataclass(frozen=True)
class Chosen:
    """The seeds, failures first, and how many requests were left out, by reason."""

    seeds: tuple[Seed, ...]
    dropped: Mapping[str, int]


def why_interesting(request: LoggedRequest) -> str:
    """`feedback` (a thumb down or a low score), `tool_error`, `unfinished`, or `traffic`."""
    if request.good is False or (request.score is not None and request.score < 0.5):
        return "feedback"
    if request.num_tool_errors:
        return "tool_error"
    return "unfinished" if request.is_unfinished else "traffic"


_ORDER = ("feedback", "tool_error", "unfinished", "traffic")


def choose_seeds(requests: Sequence[LoggedRequest], held_out: HeldOut, config: SeedsConfig) -> Chosen:
    """Choose at most `config.max_seeds` of `requests`, which come newest first."""
    dropped: Counter[str] = Counter()
    best: dict[TaskKey, Seed] = {}
    for request in requests:
        reason = _refusal(request, held_out, config)
        if reason:
            dropped[reason] += 1
            continue
        seed = Seed(request.response_id, request.prompt, request.images, why_interesting(request), request.files)
        key = task_key(seed.prompt, seed.contents)
        known = best.setdefault(key, seed)
        if known is not seed:
            dropped["duplicate"] += 1
            if _ORDER.index(seed.why) < _ORDER.index(known.why):
                best[key] = seed
    ranked = sorted(best.values(), key=lambda seed: _ORDER.index(seed.why))  # stable: newest first within a kind
    dropped["over_max"] = max(0, len(ranked) - config.max_seeds)
    return Chosen(tuple(ranked[: config.max_seeds]), {k: v for k, v in dropped.items() if v})


def is_reserved(session_id: str, share: float) -> bool:
    """Whether a session is kept back for evaluation: a fixed `share` of all session ids, by their hash."""
    if not session_id or share <= 0:
        return False
    return int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8], "big") < share * 2**64


class SeedsStage:
    """Chooses the cycle's seeds."""

    name = "seeds"

    async def run(self, cycle: Cycle) -> Ending | None:
        config = cycle.config.seeds
        progress = cycle.progress(self.name)
        num_chosen = seed_records.count_seeds(cycle.store, cycle.id)
        if not num_chosen:
            requests = seed_records.trainable_requests(cycle.store, config.max_requests)
            held_out = await asyncio.to_thread(held_out_of, cycle)
            chosen = await asyncio.to_thread(choose_seeds, requests, held_out, config)
            seed_records.insert_seeds(cycle.store, cycle.id, chosen.seeds)
            num_chosen = len(chosen.seeds)
            counts = {f"dropped_{reason}": n for reason, n in chosen.dropped.items()}
            counts.update(Counter(seed.why for seed in chosen.seeds))
            progress.begin(len(requests), len(requests), {"chosen": num_chosen, **counts})
        if num_chosen < config.min_seeds:
            raise NothingToLearnError(
                f"{num_chosen} seed requests, fewer than learner.seeds.min_seeds = {config.min_seeds}: "
                "serve more traffic with learning policy TRAIN, or lower the bound"
            )
        return None


def _refusal(request: LoggedRequest, held_out: HeldOut, config: SeedsConfig) -> str:
    if request.num_user_turns != 1 or not request.prompt.strip():
        return "not_one_turn"
    if is_reserved(request.session_id, config.reserved_session_share):
        return "reserved"
    if len(request.prompt) > config.max_chars:
        return "too_long"
    return "held_out" if held_out.match(task_key(request.prompt, request.images)) else ""
