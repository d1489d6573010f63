"""The owner thread: the only one that touches the model.

Owns the loop that takes commands (submit, abort, install or remove an adapter, close), steps, and turns
what a step produced into deltas. A failing step ends the engine: every caller gets EngineDeadError, none
waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from queue import Empty, SimpleQueue

import torch
from tokenizers import Tokenizer

from nightschool_server.engine import Delta, FinishReason, Scores, TopLogprob
from nightschool_server.engines.delivery import Outbox, reject, resolve
from nightschool_server.engines.runner import Runner, Sampled
from nightschool_server.engines.scheduler import Scheduler, drop
from nightschool_server.engines.sequences import Chunk, Job, Sequence
from nightschool_server.engines.text_stream import TextStream
from nightschool_server.errors import EngineDeadError, InvalidRequestError, NightschoolError

log = logging.getLogger(__name__)

Command = Callable[[], None]


class EngineLoop:
    """Runs steps on a thread of its own until closed or dead."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer, eos_ids: frozenset[int], num_threads: int
    ) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._num_threads = num_threads
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._outbox = Outbox()
        self._lock = threading.Lock()
        self._closing = False
        self.error: EngineDeadError | None = None
        """Set once the engine has died or closed: every later call raises it."""
        self.num_generated_tokens = 0
        self.num_prompt_tokens = 0
        self.busy_s = 0.0
        """In steps that computed something."""
        self._token_text = lru_cache(65536)(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))
        self._thread = threading.Thread(target=self._run, name="nightschool-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """From any thread: run a job; results go to its mailbox. Raises EngineDeadError."""
        self._put(lambda: self._begin(job))

    def abort(self, job: Job) -> None:
        """From any thread: stop a job at the next step; nothing where the engine has stopped."""
        with contextlib.suppress(EngineDeadError):
            self._put(lambda: drop(self._scheduler, job))

    async def call(self, command: Callable[[], None]) -> None:
        """Run something between two steps and wait for it; its NightschoolError is raised here."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            if self.error is not None:
                reject(future, self.error)
                return
            try:
                command()
            except NightschoolError as error:
                reject(future, error)
            else:
                resolve(future, None)

        self._put(run)
        await future

    def check_alive(self) -> None:
        """Raise EngineDeadError where the engine has stopped."""
        if self.error is not None:
            raise EngineDeadError(*self.error.args)

    def close(self) -> None:
        """From any thread: abort what runs, end the thread and wait for it."""

        def command() -> None:
            self._closing = True

        with contextlib.suppress(EngineDeadError):
            self._put(command)
        self._thread.join()

    def _put(self, command: Command) -> None:
        # The lock orders this against the end of the thread: a command is either refused here or run there.
        with self._lock:
            self.check_alive()
            self._commands.put(command)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._take_commands(wait=self._scheduler.is_idle())
                    if not self._closing:
                        self._step()
            self._stop(EngineDeadError("the engine was closed: start the server again"))
            self._end_all(None)
        except Exception as error:
            # Whatever a step raises leaves caches and counts in doubt: end the engine rather than guess.
            log.exception("event=engine_died")
            dead = EngineDeadError(f"the engine stopped: {type(error).__name__} in a step: restart the server")
            self._stop(dead)
            self._end_all(dead)
        while not self._commands.empty():
            self._commands.get()()
        self._outbox.send()

    def _stop(self, error: EngineDeadError) -> None:
        with self._lock:
            self.error = error

    def _take_commands(self, *, wait: bool) -> None:
        if wait:
            self._commands.get()()
        try:
            while not self._closing:
                self._commands.get_nowait()()
        except Empty:
            return

    def _begin(self, job: Job) -> None:
        if self.error is not None:
            self._outbox.put(job.mailbox, EngineDeadError(*self.error.args))
            return
        self.num_prompt_tokens += job.num_prompt
        for sequence in job.sequences:
            sequence.text = TextStream(
                self._tokenizer, job.sampling.stop, self._eos_ids if job.sampling.special_tokens else None
            )
            sequence.matcher = None if job.guide is None else job.guide.matcher()
            self._scheduler.add(sequence)

    def _step(self) -> None:
        began = time.perf_counter()
        self._scheduler.admit()
        chunks = self._see(self._scheduler.select())
        if not chunks:
            self._outbox.send()
            return
        result = self._runner.step(chunks)
        for chunk in chunks:
            self._scheduler.computed(chunk)
            sequence = chunk.sequence
            if sequence.job.continuation is not None and chunk.end == sequence.num_to_compute:
                self._give_scores(sequence)
        for sampled in result.sampled:
            self._give_token(sampled)
        self.num_generated_tokens += len(result.sampled)
        # Counted before anybody hears of it: who looks after an answer finds the whole step.
        self.busy_s += time.perf_counter() - began
        self._outbox.send()

    def _see(self, chunks: list[Chunk]) -> list[Chunk]:
        """Run the vision tower where it has yet to; a job whose images it cannot read fails alone."""
        for job in {id(c.sequence.job): c.sequence.job for c in chunks if c.sequence.job.needs_vision}.values():
            try:
                self._runner.see(job)
            except InvalidRequestError as error:
                drop(self._scheduler, job)
                self._outbox.put(job.mailbox, error)
        return [chunk for chunk in chunks if not chunk.sequence.finished]

    def _give_scores(self, sequence: Sequence) -> None:
        job = sequence.job
        assert job.continuation is not None
        scores = Scores(tuple(job.continuation.tolist()), tuple(sequence.scores), job.num_prompt)
        self._scheduler.finish(sequence)
        self._outbox.put(job.mailbox, scores)

    def _give_token(self, sampled: Sampled) -> None:
        sequence, job = sampled.sequence, sampled.sequence.job
        sequence.push(sampled.token_id)
        if sequence.matcher is not None:
            sequence.matcher.accept(sampled.token_id)
        assert sequence.text is not None
        finish: FinishReason | None = None
        text, stopped = sequence.text.push(sampled.token_id)
        if stopped or (sampled.token_id in self._eos_ids and not job.sampling.ignore_eos):
            finish = "stop"
        elif sequence.num_sampled >= job.sampling.max_tokens:
            finish = "length"
        if finish is not None:
            if not stopped:
                rest, stopped = sequence.text.finish()
                text += rest
            self._scheduler.finish(sequence)
        self._outbox.put(
            job.mailbox,
            Delta(
                index=sequence.index,
                text=text,
                token_ids=(sampled.token_id,),
                logprobs=() if sampled.logprob is None or not job.sampling.logprobs else (sampled.logprob,),
                top_logprobs=() if sampled.top is None else (self._top(sampled.top),),
                finish_reason="stop" if stopped else finish,
                num_prompt_tokens=job.num_prompt,
                num_cached_tokens=sequence.num_cached,
            ),
        )

    def _top(self, top: tuple[tuple[int, float], ...]) -> tuple[TopLogprob, ...]:
        return tuple(TopLogprob(token_id, self._token_text(token_id), logprob) for token_id, logprob in top)

    def _end_all(self, error: EngineDeadError | None) -> None:
        """End every job: with an error, or with `cancelled` where the engine closed."""
        for sequence in self._scheduler.unfinished():
            job = sequence.job
            if error is not None or job.continuation is not None:
                assert self.error is not None
                self._outbox.put(job.mailbox, EngineDeadError(*self.error.args))
            else:
                self._outbox.put(
                    job.mailbox,
                    Delta(sequence.index, "", finish_reason="cancelled", num_prompt_tokens=job.num_prompt),
                )
            self._scheduler.finish(sequence)
        self._outbox.send()
