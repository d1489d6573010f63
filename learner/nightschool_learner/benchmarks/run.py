"""Running a benchmark's tasks: each a RunTask of a server, as any client would ask for it.

The server's application brings the tools and the system prompt. Decoding is greedy, the adapter is pinned for the whole
run, and requests are NO_LOG, so that a benchmark never becomes a seed. Owns what becomes of a task that the server
refuses or cannot run; what is kept is `attempts.py`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nightschool
from nightschool import AsyncClient
from nightschool_server.agent.code import CODE_TOOL

from nightschool_learner.benchmarks.attempts import AttemptLog, Run
from nightschool_learner.benchmarks.task import Action, Attempt, BenchmarkTask
from nightschool_learner.errors import ServerGoneError

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
"""Suffixes of what the model is shown as a picture."""

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
AWAY = (nightschool.UnavailableError, nightschool.OverloadedError, nightschool.CancelledError)
"""What a call ends with when the server is away, full or draining."""


@dataclass(frozen=True)
class Examination:
    """One run: who is asked, how, and where the attempts go."""

    client: AsyncClient
    run: Run
    log: AttemptLog
    concurrency: int
    server_wait_s: float
    """How long a server may be away before the run is given up."""
    on_attempt: Callable[[Attempt], None]

    async def examine(self, tasks: Sequence[BenchmarkTask]) -> None:
        """Run every task that has no attempt yet. Raises ServerGoneError, and the SDK's errors of a caller."""
        waiting = iter([task for task in tasks if task.id not in self.log.attempts])

        async def worker() -> None:
            for task in waiting:  # one shared iterator: each worker takes the next task
                attempt = await self._patiently(task)
                self.log.add(attempt)
                self.on_attempt(attempt)

        workers = {asyncio.create_task(worker()) for _ in range(self.concurrency)}
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _patiently(self, task: BenchmarkTask) -> Attempt:
        """The attempt, begun again while the server is away."""
        delay_s, given_up_at = FIRST_DELAY_S, None
        while True:
            try:
                return await self._attempt(task)
            except AWAY as error:
                now = time.monotonic()
                given_up_at = given_up_at or now + self.server_wait_s
                if now >= given_up_at:
                    raise ServerGoneError(
                        f"no answer for {self.server_wait_s:g} s: {error}; what was attempted is kept, run it again"
                    ) from error
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    async def _attempt(self, task: BenchmarkTask) -> Attempt:
        begun = time.monotonic()
        called: list[str] = []
        try:
            result = await self._ask(task, called)
        except (nightschool.InvalidRequestError, nightschool.MessageTooLargeError) as error:
            overflows = isinstance(error, nightschool.ContextOverflowError)
            outcome = "context_overflow" if overflows else "refused"
            return Attempt(task.id, "", outcome, seconds=time.monotonic() - begun, error=error.message)
        except nightschool.DeadlineExceededError as error:
            return Attempt(task.id, "", "deadline", seconds=time.monotonic() - begun, error=error.message)
        return attempt_of(task, result, called, time.monotonic() - begun)

    async def _ask(self, task: BenchmarkTask, called: list[str]) -> nightschool.TaskResult:
        """The task's result; the names of the tools that are called go into `called`."""
        run = self.client.run_task(
            task.prompt,
            images=images_of(task) if self.run.with_images else (),
            files=task.files,
            max_steps=self.run.max_steps,
            max_tokens=self.run.max_tokens,
            temperature=0.0,
            adapter=self.run.adapter,
            learning=nightschool.LearningPolicy.NO_LOG,
            timeout_s=self.run.timeout_s,
        )
        async for event in run:
            if isinstance(event, nightschool.ToolCalled):
                called.append(event.call.name)
        return await run.result()


def images_of(task: BenchmarkTask) -> list[Path]:
    """The task's files that a model can look at."""
    return [file for file in task.files if file.suffix.lower() in IMAGES]


def attempt_of(task: BenchmarkTask, result: nightschool.TaskResult, called: Sequence[str], seconds: float) -> Attempt:
    """What a task's result and the calls that it made say of the attempt."""
    parts = [part for message in result.messages for part in message.parts]
    results = [part for part in parts if isinstance(part, nightschool.ToolResult)]
    return Attempt(
        task_id=task.id,
        answer=result.answer,
        outcome=str(result.outcome),
        actions=tuple(Action(each.name, each.is_error) for each in results),
        tools=tuple(name for name in called if name != CODE_TOOL),
        num_steps=result.num_steps,
        completion_tokens=result.usage.completion_tokens,
        seconds=round(seconds, 3),
        response_id=result.response_id,
    )
