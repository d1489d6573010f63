"""Which sequences run, in which slots, and which tokens the next step computes.

Owns the waiting queue, the slots' occupancy and the policy: lower priority numbers first, then order of
arrival; a live request that finds no slot takes one from the youngest practice sequence, which goes back
to the queue with its sampled tokens; while live requests come, practice gets a few tokens of each step. A sequence
whose prefix another is just computing waits for it. Pure bookkeeping on the owner thread.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from nightschool_server.engine import PRACTICE_PRIORITY
from nightschool_server.engines.sequences import Chunk, Job, Sequence
from nightschool_server.engines.slots import PrefixIndex

_MIN_SHARED = 4
"""Fewer tokens than this are not worth a copy."""
_MIN_AWAITED = 16
"""A sequence waits for another's prefill if that saves it at least so many tokens."""
_ROWS_BETWEEN_LIVE = 4
"""Times `max_practice_rows_with_live`, for practice in a step between two live requests."""
_MAX_IMAGES_PER_STEP = 4
"""Vision tower runs per step: decoding sequences wait for them."""
_LINGERS_LATELY = 20
"""Live requests came lately until so many times `live_linger_s` after the last one."""
_PREFILL_LATELY = 64
"""Tokens of practice that a step prefills where live requests came lately: a step of a whole chunk and four images
holds up the next live request for a tenth of a second and more."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the policy, from the engine's configuration."""

    num_slots: int
    num_retained_slots: int
    prefill_chunk_tokens: int
    max_practice_rows_with_live: int
    live_linger_s: float


@dataclass(frozen=True)
class Share:
    """What practice gets of one step."""

    num_tokens: int
    num_prefill: int
    """Of `num_tokens`, at most."""
    num_images: int
    """Vision tower runs of the step in which its own may be."""


def share_of(limits: Limits, live_runs: bool, since_live_s: float) -> Share:
    """What practice gets of a step by how long ago a live request ran: the less, the sooner the next one may come."""
    if live_runs or since_live_s < limits.live_linger_s:
        num_tokens = limits.max_practice_rows_with_live * (1 if live_runs else _ROWS_BETWEEN_LIVE)
        return Share(num_tokens, num_tokens, 1)
    if since_live_s < _LINGERS_LATELY * limits.live_linger_s:
        num_prefill = min(_PREFILL_LATELY, limits.prefill_chunk_tokens)
        return Share(limits.num_slots + num_prefill, num_prefill, 1)
    return Share(limits.num_slots + limits.prefill_chunk_tokens, limits.prefill_chunk_tokens, _MAX_IMAGES_PER_STEP)


class Scheduler:
    """The policy and its state."""

    def __init__(self, limits: Limits, copy_prefix: Callable[[int, int, int], None]) -> None:
        self._limits = limits
        self._copy_prefix = copy_prefix
        total = limits.num_slots + limits.num_retained_slots
        self.index = PrefixIndex(total)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, int, Sequence]] = []
        self._free = set(range(total))
        self._last_used = [0] * total
        self._clock = 0
        self._live_at = float("-inf")
        """When a live request last ran."""
        self.num_cached_tokens = 0
        self.num_left_queue = {True: 0, False: 0}
        """Sequences that no longer wait for their first slot, by whether they are practice; only ever grows."""

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return sum(1 for *_, sequence in self._waiting if not sequence.finished)

    def is_idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self.running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        job = sequence.job
        heapq.heappush(self._waiting, (job.priority, job.arrival, sequence.index, sequence))

    def finish(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has ended; what it computed stays for others to take over."""
        sequence.finished = True
        self._leave_queue(sequence)
        if sequence.slot >= 0:
            self._leave(sequence)

    def unfinished(self) -> list[Sequence]:
        """Every sequence, running or waiting."""
        return [*self.running, *(s for *_, s in self._waiting if not s.finished)]

    def uses_adapter(self, serial: int) -> bool:
        """Whether a sequence runs or waits on an adapter version."""
        return any(sequence.job.serial == serial for sequence in self.unfinished())

    def admit(self) -> None:
        """Give slots to waiting sequences."""
        put_off: list[tuple[int, int, int, Sequence]] = []
        while self._waiting and len(put_off) < 2 * self._limits.num_slots:
            entry = self._waiting[0]
            sequence = entry[3]
            if sequence.finished:
                heapq.heappop(self._waiting)
                continue
            full = len(self.running) >= self._limits.num_slots
            victim = self._victim(sequence) if full else None
            if full and victim is None:
                break
            donor, num_shared, awaited = self._donor(sequence)
            heapq.heappop(self._waiting)
            if awaited:
                put_off.append(entry)
                continue
            if victim is not None:
                self._preempt(victim)
            self._place(sequence, donor, num_shared)
        for entry in put_off:
            heapq.heappush(self._waiting, entry)

    def select(self) -> list[Chunk]:
        """The tokens of the next step: every decoding sequence's last one, and prefill chunks under the budget.

        Practice gets less the more likely a live request is to come: it waits for the end of the step that it finds.
        """
        self._clock += 1
        running = sorted(self.running, key=lambda s: (s.job.priority, s.job.arrival, s.index))
        num_live = sum(1 for s in running if s.job.priority < PRACTICE_PRIORITY)
        budget, num_images = self._limits.prefill_chunk_tokens, 0
        share = self._share(num_live > 0)
        practice_left, prefill_left = share.num_tokens, share.num_prefill
        chunks: list[Chunk] = []
        for position, sequence in enumerate(running):
            practice = position >= num_live
            if practice and not practice_left:
                break
            start, end = sequence.num_computed, sequence.num_to_compute
            if sequence.job.needs_vision:
                pictures = len(sequence.job.rendered.pictures)
                if num_images and num_images + pictures > (share.num_images if practice else _MAX_IMAGES_PER_STEP):
                    continue
                num_images += pictures
            if end - start > 1:
                end = min(end, start + (min(budget, practice_left, prefill_left) if practice else budget))
                budget -= end - start
                prefill_left -= end - start if practice else 0
            practice_left -= end - start if practice else 0
            if end > start:
                chunks.append(Chunk(sequence, start, end))
        return chunks

    def _share(self, live_runs: bool) -> Share:
        """What practice gets of the next step."""
        now = time.monotonic()
        if live_runs:
            self._live_at = now
        return share_of(self._limits, live_runs, now - self._live_at)

    def computed(self, chunk: Chunk) -> None:
        """A chunk's tokens are in the cache now."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if chunk.end - chunk.start > 1 or chunk.end <= sequence.job.num_prompt:
            self.index.computed(sequence.slot, chunk.end)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The youngest running practice sequence, for a live one that waits."""
        if sequence.job.priority >= PRACTICE_PRIORITY:
            return None
        practice = [s for s in self.running if s.job.priority >= PRACTICE_PRIORITY]
        return max(practice, key=lambda s: (s.job.priority, s.job.arrival, s.index), default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_computed = 0
        self.add(sequence)

    def _donor(self, sequence: Sequence) -> tuple[int, int, bool]:
        """(slot with the longest common prefix, its length, whether to wait for a longer one being computed)."""
        keys = sequence.keys[: sequence.needs_logits_from]
        now, later = self.index.match(sequence.job.serial, keys)
        donor = int(now.argmax())
        num_shared = int(now[donor])
        awaited = any(
            later[s.slot] - num_shared >= _MIN_AWAITED and s.num_computed < s.job.num_prompt
            for s in self.running
            if s.job.priority <= sequence.job.priority
        )
        return donor, num_shared, awaited

    def _place(self, sequence: Sequence, donor: int, num_shared: int) -> None:
        if num_shared < _MIN_SHARED:
            num_shared = 0
        slot = min(self._free, key=lambda s: (s == donor and num_shared > 0, self._last_used[s], s))
        if num_shared and donor in self._free and 2 * num_shared >= self.index.num_computed(donor):
            slot = donor
        if num_shared and slot != donor:
            self._copy_prefix(donor, slot, num_shared)
            self._last_used[donor] = self._clock
        self._free.discard(slot)
        sequence.slot = slot
        sequence.num_computed = num_shared
        self.index.plan(slot, sequence.job.serial, sequence.keys[: sequence.num_known], num_shared)
        self.running.append(sequence)
        if not sequence.started:
            self._leave_queue(sequence)
            sequence.num_cached = min(num_shared, sequence.job.num_prompt)
            self.num_cached_tokens += sequence.num_cached

    def _leave_queue(self, sequence: Sequence) -> None:
        if not sequence.started:
            sequence.started = True
            self.num_left_queue[sequence.job.priority >= PRACTICE_PRIORITY] += 1

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.index.retain(sequence.slot, sequence.keys[: sequence.num_computed])
        self._free.add(sequence.slot)
        self._last_used[sequence.slot] = self._clock
        sequence.slot = -1


def drop(scheduler: Scheduler, job: Job) -> None:
    """Abort every sequence of a job."""
    for sequence in job.sequences:
        if not sequence.finished:
            scheduler.finish(sequence)
