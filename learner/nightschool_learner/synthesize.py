"""Synthesis: the model writes new tasks in the manner of a few seeds, and a screen keeps or drops them.

The unit of work is a slot: up to `max_attempts` answers of the writer, of which the first that passes every
check is kept; else the slot is a dropped task with the reason of its last attempt. Seeds and sampling are
drawn from (cycle seed, slot, attempt), so a slot that is run again is the same slot; only which of two equal
tasks of one cycle is kept depends on which was finished first.

Deviation from SPORT: no image retrieval; a task about a picture reuses the picture of one of its seeds, and one about
files the files of its seeds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from nightschool_server.chat import File, ToolSpec
from nightschool_server.config.practice import SynthesizeConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError

from nightschool_learner import seed_records
from nightschool_learner.contamination import held_out_of
from nightschool_learner.errors import EndpointError, NothingToLearnError
from nightschool_learner.parallel import for_each
from nightschool_learner.picture_index import Looks
from nightschool_learner.prompts import SeedView, WrittenTask, parse_written_task, writer_messages
from nightschool_learner.roles import Model, open_role
from nightschool_learner.sampling import AnswerSampler, PracticeSampler, derive_seed
from nightschool_learner.screening import HeldOut, Pool, TaskKey, task_key, words_of
from nightschool_learner.seed_records import KEPT, Attempt, Seed, TaskRow, contents_of
from nightschool_learner.stages import Cycle, Ending
from nightschool_learner.writer import Writer


@dataclass(frozen=True)
class Belongings:
    """What a written task takes over from the seeds that it was written from."""

    images: tuple[str, ...] = ()
    files: tuple[File, ...] = ()


def belongings_of(written: WrittenTask, examples: Sequence[Seed]) -> Belongings:
    """The pictures of the example that the writer named, and the files that the task's text names.

    Of two files of one name the first counts. A text that names none, where every example has files, is about those of
    the first one.
    """
    images = () if written.image_of is None else examples[written.image_of].images
    files: dict[str, File] = {}
    for seed in examples:
        for file in seed.files:
            if file.name in written.prompt:
                files.setdefault(file.name, file)
    if not files and examples and all(seed.files for seed in examples):
        files = {file.name: file for file in examples[0].files}
    return Belongings(images, tuple(files.values()))


@dataclass
class Screen:
    """The checks that a written task passes, and the tasks that are there already."""

    config: SynthesizeConfig
    held_out: HeldOut
    known: Pool

    def judge(self, written: WrittenTask, examples: Sequence[Seed]) -> tuple[str, Belongings]:
        """`kept` or the reason for dropping, and what the task brings. A kept task is known from now on."""
        brings = belongings_of(written, examples)
        key = task_key(written.prompt, contents_of(brings.images, brings.files))
        reason = self._reason(key, written.prompt, examples)
        if reason == KEPT:
            self.known.add(key)
        return reason, brings

    def _reason(self, key: TaskKey, prompt: str, examples: Sequence[Seed]) -> str:
        if not self.config.min_words <= len(key.words) or len(prompt) > self.config.max_chars:
            return "length"
        if contaminated := self.held_out.match(key):
            return f"held_out_{contaminated}"
        if any(key == task_key(seed.prompt, seed.contents) for seed in examples):
            return "copy"
        return self.known.match(key) or KEPT


@dataclass(frozen=True)
class Author:
    """Fills slots: what the model is asked, and what becomes of its answers."""

    cycle_seed: int
    config: SynthesizeConfig
    tools: tuple[ToolSpec, ...]
    seeds: Sequence[Seed]
    screen: Screen
    model: Model

    async def fill(self, slot: int) -> tuple[TaskRow, list[Attempt], list[Seed]]:
        """Write the task of one slot."""
        examples = self.examples(slot)
        views = [SeedView("".join(file.line for file in seed.files) + seed.prompt, seed.images) for seed in examples]
        prompt = Prompt(writer_messages(self.tools, views))
        attempts: list[Attempt] = []
        text, brings = "", Belongings()
        for attempt in range(self.config.max_attempts):
            sampling = Sampling(
                max_tokens=self.config.max_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=derive_seed(self.cycle_seed, "write", slot, attempt),
            )
            try:
                samples = await self.model.sampler.sample(prompt, sampling, adapter=self.model.adapter)
            except ContextOverflowError as error:
                attempts.append(Attempt(str(error), "overflow", 0))
                break
            except EndpointError as error:
                attempts.append(Attempt(str(error), "unavailable", 0))
                continue
            answer = samples.answers[0]
            text, brings, verdict = self._read(answer.text, views, examples)
            attempts.append(Attempt(answer.text, verdict, samples.num_completion_tokens or len(answer.token_ids)))
            if verdict == KEPT:
                break
        task = seed_records.new_task(slot, text, brings.images, attempts[-1].verdict, brings.files)
        return task, attempts, examples

    def examples(self, slot: int) -> list[Seed]:
        """The seeds that slot `slot` is written from."""
        rng = random.Random(derive_seed(self.cycle_seed, "examples", slot))
        return rng.sample(self.seeds, min(self.config.num_examples, len(self.seeds)))

    def _read(self, text: str, views: Sequence[SeedView], examples: Sequence[Seed]) -> tuple[str, Belongings, str]:
        try:
            written = parse_written_task(text, views)
        except ValueError:
            return "", Belongings(), "parse"
        verdict, brings = self.screen.judge(written, examples)
        return written.prompt, brings, verdict


@dataclass(frozen=True)
class SynthesizeStage:
    """Fills every slot of the cycle."""

    make_sampler: Callable[[Cycle], AnswerSampler] = PracticeSampler
    name: str = "synthesize"

    async def run(self, cycle: Cycle) -> Ending | None:
        config, progress = cycle.config.synthesize, cycle.progress(self.name)
        done = {task.slot: task for task in seed_records.tasks_of(cycle.store, cycle.id)}
        progress.begin(config.num_tasks, len(done), seed_records.writer_counts(cycle.store, cycle.id))
        seeds = seed_records.seeds_of(cycle.store, cycle.id)
        screen = await asyncio.to_thread(open_screen, cycle, seeds, done.values())
        playing = open_role(cycle, "writer", config, self.make_sampler(cycle))
        async with Writer(cycle.store) as writer, playing as model:
            author = Author(
                cycle_seed=cycle.seed,
                config=config,
                tools=cycle.tools,
                seeds=seeds,
                screen=screen,
                model=model,
            )

            async def fill(slot: int) -> None:
                task, attempts, examples = await author.fill(slot)
                await writer.write(lambda db: seed_records.insert_task(db, cycle.id, task, attempts, examples))
                progress.advance(**seed_records.attempt_counts(attempts))

            left = [slot for slot in range(config.num_tasks) if slot not in done]
            await for_each(cycle, left, fill, config.concurrency)
        num_kept = sum(task.state == KEPT for task in seed_records.tasks_of(cycle.store, cycle.id))
        if num_kept < config.min_tasks:
            raise NothingToLearnError(
                f"{num_kept} tasks kept of {config.num_tasks}, fewer than learner.synthesize.min_tasks = "
                f"{config.min_tasks}: the stage's counts say why tasks were dropped"
            )
        return None


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
