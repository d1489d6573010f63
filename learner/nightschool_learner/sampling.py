"""Sampling through the server: the learner as one more caller, behind every live request.

Owns the connection of a cycle to the server of its home, the waiting for a server that is away or a learner
that is paused, and the seeds of all sampling. Every request is PRACTICE (it runs when no live request waits),
NO_LOG (what the learner samples never becomes a seed), and pinned to an adapter by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import nightschool
from nightschool import AsyncClient
from nightschool_server import chat
from nightschool_server.engine import Delta, FinishReason, Prompt, Sampling, TopLogprob
from nightschool_server.errors import ContextOverflowError, InvalidRequestError
from nightschool_server.home import Home

from nightschool_learner.errors import ServerGoneError
from nightschool_learner.stages import Cycle

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_TIMEOUT_S = 600.0
"""A call of practice waits behind every live request; the server caps it at `server.max_deadline_s`."""
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0

SdkPart = nightschool.Text | nightschool.Image | nightschool.ToolCall | nightschool.ToolResult

AWAY = (
    nightschool.UnavailableError,
    nightschool.OverloadedError,
    nightschool.DeadlineExceededError,
    nightschool.CancelledError,
)
"""What a call ends with when the server is away, full or draining: trying again later helps."""


@dataclass(frozen=True)
class Sample:
    """One sampled answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token, of the untempered distribution."""
    top_logprobs: tuple[tuple[TopLogprob, ...], ...]
    """The likeliest tokens at each position, where asked for."""
    finish_reason: FinishReason

    @property
    def logprob(self) -> float:
        """Of the whole answer."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Samples:
    """The answers of one call."""

    answers: tuple[Sample, ...]
    num_prompt_tokens: int
    num_completion_tokens: int = 0
    """Of all answers together."""


def derive_seed(cycle_seed: int, *what: str | int) -> int:
    """A seed for one use within a cycle: 48 bits of a hash, so that no two uses share a stream."""
    digest = hashlib.sha256(chat.canonical_json([cycle_seed, *what]).encode()).digest()
    return int.from_bytes(digest[:6], "big")


@contextlib.asynccontextmanager
async def connect(home: Home) -> AsyncIterator[AsyncClient]:
    """A client of the server that `home` names now, with the learner's token. Raises ServerGoneError."""
    try:
        address = str(json.loads(home.server_file.read_text(encoding="utf-8"))["address"])
        token = home.learner_token.read_text(encoding="utf-8").strip()
    except (OSError, ValueError, KeyError) as error:
        raise ServerGoneError(f"no server runs on {home.path}: {error}") from error
    client = AsyncClient(address, token=token, home=home.path)
    try:
        yield client
    finally:
        await client.close()


async def patiently(cycle: Cycle, call: Callable[[], Awaitable[T]]) -> T:
    """Make a call as soon as the learner is not paused, again while the server is away.

    Raises ServerGoneError after `learner.server_wait_s` of that, CycleCancelledError where the cycle is
    cancelled, and whatever else the call raises.
    """
    delay_s, given_up_at = FIRST_DELAY_S, None
    while True:
        await until_resumed(cycle)
        try:
            return await call()
        except AWAY as error:
            now = time.monotonic()
            given_up_at = given_up_at or now + cycle.config.server_wait_s
            if now >= given_up_at:
                raise ServerGoneError(f"no answer for {cycle.config.server_wait_s:g} s: {error}") from error
            logger.debug("event=server_away cycle=%s retry_in_s=%.1f error=%s", cycle.id, delay_s, error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(cycle.cancelled.wait(), delay_s)
        delay_s = min(2 * delay_s, MAX_DELAY_S)


class AnswerSampler(Protocol):
    """Samples whole answers; the seam between the learner and whatever runs the model."""

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        """`sampling.n` answers to `prompt`, from the model with `adapter`. Raises ContextOverflowError."""
        ...


@dataclass(frozen=True)
class PracticeSampler:
    """Samples answers for a cycle from the server of its home: an `AnswerSampler`."""

    cycle: Cycle

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        """`sampling.n` answers to `prompt`, from the model with `adapter`.

        Images whose bytes are not in `prompt.images` must be blobs of the home. Raises InvalidRequestError and
        ContextOverflowError as the engine does, and what `patiently` raises.
        """
        as_live = self.cycle.config.fault_injection.practice_as_live
        turns = [_to_sdk(message, prompt.images) for message in prompt.messages]
        specs = [_tool_to_sdk(tool) for tool in prompt.tools]

        async def call() -> nightschool.Reply:
            return await self.cycle.client.generate(
                turns,
                tools=specs,
                tool_choice=prompt.tool_choice,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop=sampling.stop,
                n=sampling.n,
                logprobs=True,
                top_logprobs=sampling.top_logprobs,
                adapter=adapter,
                learning=nightschool.LearningPolicy.NO_LOG,
                priority=nightschool.Priority.LIVE if as_live else nightschool.Priority.PRACTICE,
                timeout_s=CALL_TIMEOUT_S,
            )

        try:
            reply = await patiently(self.cycle, call)
        except nightschool.ContextOverflowError as error:
            raise ContextOverflowError(error.field or "messages", error.message) from error
        except nightschool.InvalidRequestError as error:
            raise InvalidRequestError(error.field or "messages", error.message) from error
        answers = tuple(_sample(answer) for answer in reply.answers)
        return Samples(answers, reply.usage.prompt_tokens, sum(len(answer.token_ids) for answer in answers))

    async def engine_busy_s(self) -> float | None:
        """How long the engine has worked since its start, seconds; None where no server says so now."""
        try:
            status = await self.cycle.client.admin.status()
        except nightschool.NightschoolError as error:
            logger.debug("event=engine_unseen cycle=%s error=%s", self.cycle.id, error)
            return None
        return None if status.engine_status is None else status.engine_status.busy_s


@dataclass(frozen=True)
class AdapterSampler:
    """An `AnswerSampler` on one adapter, as the agent loop wants it: an `agent.Sampler`, one delta an answer."""

    sampler: AnswerSampler
    adapter: str

    async def sample(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta]:
        samples = await self.sampler.sample(prompt, sampling, adapter=self.adapter)
        for index, answer in enumerate(samples.answers):
            yield Delta(
                index=index,
                text=answer.text,
                token_ids=answer.token_ids,
                logprobs=answer.logprobs,
                finish_reason=answer.finish_reason,
                num_prompt_tokens=samples.num_prompt_tokens,
            )


async def until_resumed(cycle: Cycle) -> None:
    """Return when the learner is not paused. Raises CycleCancelledError."""
    while not cycle.resumed.is_set() and not cycle.cancelled.is_set():
        waits = [asyncio.create_task(cycle.resumed.wait()), asyncio.create_task(cycle.cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
    cycle.check()


def _sample(answer: nightschool.Answer) -> Sample:
    tokens = answer.tokens
    assert tokens is not None, "the server was asked for logprobs"
    return Sample(
        text=answer.text,
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        top_logprobs=tuple(
            tuple(TopLogprob(*entry) for entry in zip(top.ids, top.texts, top.logprobs, strict=True))
            for top in tokens.top
        ),
        # A tool call is how an answer reads, not how it ended: the engine knows only stop and length.
        finish_reason="length" if answer.finish_reason is nightschool.FinishReason.LENGTH else "stop",
    )


def _to_sdk(message: chat.Message, images: Mapping[str, bytes]) -> nightschool.Message:
    parts = tuple(_part_to_sdk(part, images) for part in message.parts)
    return nightschool.Message(nightschool.Role(message.role), parts)


def _part_to_sdk(part: chat.Part, images: Mapping[str, bytes]) -> SdkPart:
    match part:
        case chat.Text(text):
            return nightschool.Text(text)
        case chat.Image(sha256):
            return _image_to_sdk(sha256, images)
        case chat.File():
            # A model call has no workspace: the model sees the same line either way.
            return nightschool.Text(part.line)
        case chat.ToolCall(id_, name, arguments):
            return nightschool.ToolCall(id_, name, arguments)
        case chat.ToolResult(call_id, name, content, is_error):
            pictures = tuple(_image_to_sdk(sha256, images) for sha256 in part.images)
            return nightschool.ToolResult(call_id, name, content, is_error, pictures, simulated=part.simulated)


def _image_to_sdk(sha256: str, images: Mapping[str, bytes]) -> nightschool.Image:
    return nightschool.Image(data=images[sha256]) if sha256 in images else nightschool.Image(sha256=sha256)


@functools.lru_cache(maxsize=256)
def _tool_to_sdk(tool: chat.ToolSpec) -> nightschool.Tool:
    return nightschool.Tool(tool.name, tool.description, tool.schema, strict=tool.strict)
