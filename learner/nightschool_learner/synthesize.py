"""Synthesis: the model writes new tasks in the manner of a few seeds, and a screen keeps or drops them.

The unit of work is a slot: up to `max_attempts` answers of the writer, of which the first that passes every
check is kept; else the slot is a dropped task with the reason of its last attempt. Seeds and sampling are
drawn from (cycle seed, slot, attempt), so a slot that is run again is the same slot; only which of two equal
tasks of one cycle is kept depends on which was finished first.

Owns slots, attempts and the order of checks. What a draft's files are and who looks at it is `synthesis/`.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from nightschool_server.agent.toolbox import open_tools
from nightschool_server.config.practice import SynthesizeConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError

from nightschool_learner import seed_records
from nightschool_learner.contamination import held_out_of
from nightschool_learner.curriculum import weights_for
from nightschool_learner.difficulty import OpenTools, drop_settled_and_hopeless, probe_counts
from nightschool_learner.errors import EndpointError, NothingToLearnError
from nightschool_learner.families import draw
from nightschool_learner.parallel import for_each
from nightschool_learner.picture_index import Looks
from nightschool_learner.roles import Model, open_role
from nightschool_learner.sampling import AnswerSampler, PracticeSampler, derive_seed
from nightschool_learner.screening import Pool, task_key, words_of
from nightschool_learner.seed_records import KEPT, Attempt, Seed, TaskRow
from nightschool_learner.stages import Cycle, Ending
from nightschool_learner.synthesis.description_records import caption_counts
from nightschool_learner.synthesis.drafts import Draft, Drafter, Place, Screen
from nightschool_learner.synthesis.records import (
    FileOrigin,
    Verification,
    file_counts,
    file_counts_of,
    insert_origins,
    insert_verifications,
)
from nightschool_learner.synthesis.verifier import Verifier
from nightschool_learner.synthesis.workshop import open_workshop
from nightschool_learner.writer import Writer


@dataclass(frozen=True)
class Slot:
    """What became of a slot, whole: the unit of work."""

    task: TaskRow
    attempts: tuple[Attempt, ...]
    examples: tuple[Seed, ...]
    origins: tuple[FileOrigin, ...] = ()
    """Of the task's planned files."""
    verifications: tuple[Verification, ...] = ()

    def insert(self, db: sqlite3.Connection, cycle_id: str) -> None:
        """Write it into an open transaction."""
        seed_records.insert_task(db, cycle_id, self.task, self.attempts, self.examples)
        insert_origins(db, self.task.id, self.origins)
        insert_verifications(db, self.task.id, self.verifications)

    @property
    def counts(self) -> dict[str, int]:
        """What the stage shows of it."""
        is_kept = self.task.state == KEPT
        return seed_records.attempt_counts(self.attempts) | file_counts(
            self.origins if is_kept else (), self.verifications
        )


@dataclass(frozen=True)
class Author:
    """Fills slots: what the model is asked, and what becomes of its answers."""

    cycle_seed: int
    config: SynthesizeConfig
    seeds: Sequence[Seed]
    screen: Screen
    model: Model
    drafter: Drafter
    verifier: Verifier | None = None
    weights: Sequence[float] = ()
    """Of the seeds, by the curriculum; empty where all are alike."""

    async def fill(self, slot: int) -> Slot:
        """Write the task of one slot."""
        examples = self.examples(slot)
        prompt = Prompt(self.drafter.messages(examples))
        attempts: list[Attempt] = []
        verifications: list[Verification] = []
        draft = Draft()
        for attempt in range(self.config.max_attempts):
            place = Place(self.cycle_seed, slot, attempt)
            try:
                samples = await self.model.sampler.sample(prompt, self._sampling(place), adapter=self.model.adapter)
            except ContextOverflowError as error:
                attempts.append(Attempt(str(error), "overflow", 0))
                break
            except EndpointError as error:
                attempts.append(Attempt(str(error), "unavailable", 0))
                continue
            answer = samples.answers[0]
            draft = await self._drafted(answer.text, examples, place)
            verifications += [draft.verification] if draft.verification else []
            tokens = samples.num_completion_tokens or len(answer.token_ids)
            attempts.append(Attempt(answer.text, draft.verdict, tokens, draft.reason, draft.tokens))
            if draft.verdict == KEPT:
                break
        brings = draft.brings
        task = seed_records.new_task(slot, draft.prompt, brings.images, attempts[-1].verdict, brings.files)
        return Slot(task, tuple(attempts), tuple(examples), brings.origins, tuple(verifications))

    def examples(self, slot: int) -> list[Seed]:
        """The seeds that slot `slot` is written from."""
        rng = random.Random(derive_seed(self.cycle_seed, "examples", slot))
        num = min(self.config.num_examples, len(self.seeds))
        return draw(rng, self.seeds, self.weights, num) if self.weights else rng.sample(self.seeds, num)

    def _sampling(self, place: Place) -> Sampling:
        return Sampling(
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=derive_seed(self.cycle_seed, "write", place.slot, place.attempt),
        )

    async def _drafted(self, text: str, examples: Sequence[Seed], place: Place) -> Draft:
        draft = await self.drafter.draft(text, examples, place)
        if draft.verdict == KEPT and self.verifier is not None:
            draft = replace(draft, verdict=self.screen.look(draft, examples))
            draft = await self.verifier.look(draft, place) if draft.verdict == KEPT else draft
        if draft.verdict == KEPT:
            # A repaired task is another one: only now is it known what to screen for good.
            draft = replace(draft, verdict=self.screen.admit(draft, examples))
        if draft.verdict != KEPT:
            self.drafter.discard(draft)
        return draft


@dataclass(frozen=True)
class SynthesizeStage:
    """Fills every slot of the cycle."""

    make_sampler: Callable[[Cycle], AnswerSampler] = PracticeSampler
    open_tools: OpenTools = open_tools
    name: str = "synthesize"

    async def run(self, cycle: Cycle) -> Ending | None:
        config, progress = cycle.config.synthesize, cycle.progress(self.name)
        done = {task.slot: task for task in seed_records.tasks_of(cycle.store, cycle.id)}
        progress.begin(config.num_tasks, len(done), _counts(cycle))
        if left := [slot for slot in range(config.num_tasks) if slot not in done]:
            seeds = seed_records.seeds_of(cycle.store, cycle.id)
            screen = await asyncio.to_thread(open_screen, cycle, seeds, done.values())
            await self._fill(cycle, left, seeds, screen)
        if config.probe.enabled:
            await drop_settled_and_hopeless(cycle, self.make_sampler(cycle), self.open_tools)
        num_kept = sum(task.state == KEPT for task in seed_records.tasks_of(cycle.store, cycle.id))
        if num_kept < config.min_tasks:
            raise NothingToLearnError(
                f"{num_kept} tasks kept of {config.num_tasks}, fewer than learner.synthesize.min_tasks = "
                f"{config.min_tasks}: the stage's counts say why tasks were dropped"
            )
        return None

    async def _fill(self, cycle: Cycle, slots: Sequence[int], seeds: Sequence[Seed], screen: Screen) -> None:
        config, progress, sampler = cycle.config.synthesize, cycle.progress(self.name), self.make_sampler(cycle)
        async with (
            Writer(cycle.store) as writer,
            open_role(cycle, "writer", config, sampler) as model,
            open_workshop(cycle, sampler, writer, seeds=seeds, screen=screen) as shop,
        ):
            progress.counts |= caption_counts(cycle.store, cycle.id)
            progress.flush()
            weights = weights_for(cycle, seeds) if config.curriculum else ()
            author = Author(cycle.seed, config, seeds, screen, model, shop.drafter, shop.verifier, weights)

            async def fill(number: int) -> None:
                slot = await author.fill(number)
                await writer.write(lambda db: slot.insert(db, cycle.id))
                progress.advance(**slot.counts)

            await for_each(cycle, slots, fill, config.concurrency)


def _counts(cycle: Cycle) -> dict[str, int]:
    """What the rows say of the slots that are done."""
    counts = Counter(seed_records.writer_counts(cycle.store, cycle.id) | file_counts_of(cycle.store, cycle.id))
    counts.update(probe_counts(cycle))
    return dict(counts) | caption_counts(cycle.store, cycle.id)


def open_screen(cycle: Cycle, seeds: Sequence[Seed], done: Collection[TaskRow]) -> Screen:
    """The checks of a cycle. Knows the tasks that it kept so far, `done`, and those of every other cycle."""
    look = Looks(cycle.store.get_blob)
    for seed in seeds:
        for sha256 in seed.images:
            look(sha256)  # now, in a thread: a large picture would hold up the event loop
    pool = Pool(cycle.config.screen, [words_of(seed.prompt) for seed in seeds], look)
    for task in done:
        if task.state == KEPT:
            pool.add(task_key(task.prompt, task.contents))
    for prompt, contents in seed_records.tasks_of_other_cycles(cycle.store, cycle.id):
        pool.add(task_key(prompt, contents))
    return Screen(cycle.config.synthesize, held_out_of(cycle, look), pool)
