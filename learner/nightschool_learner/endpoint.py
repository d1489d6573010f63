"""The one client of OpenAI-compatible endpoints: an `AnswerSampler` for every role that is not the served model, and
a source of embeddings.

Owns rate limits, retries, timeouts, the number of calls in flight, and what each call cost. Needs
`pip install 'nightschool[endpoint]'` and a key in the environment variable that the configuration names; the key goes
into the SDK's header and nowhere else. The SDK's own retries are off: a `Retry-After` holds every call to this
endpoint, and every try is counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from nightschool_server.config.roles import EndpointConfig
from nightschool_server.engine import Prompt, Sampling, TopLogprob
from nightschool_server.errors import ContextOverflowError

from nightschool_learner.endpoint_records import EndpointCall
from nightschool_learner.errors import EndpointError, StageFailedError
from nightschool_learner.openai_messages import ReadBlob, num_text_chars, to_openai
from nightschool_learner.rates import Clock, Gate, Sleep, Window
from nightschool_learner.sampling import Sample, Samples

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_RETRY_AFTER_S = 300.0
"""An endpoint that asks for a longer rest counts as failed."""
CHARS_PER_TOKEN = 3
"""For what a call is expected to take of the token limit, until the endpoint says what it took."""
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
FATAL_STATUSES = frozenset({401, 403, 404})
"""The configuration is wrong: no retry would mend it."""

Record = Callable[[EndpointCall], Awaitable[None]]


class Counted(Protocol):
    """An answer that says what it took."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_completion_tokens(self) -> int: ...


C = TypeVar("C", bound=Counted)


@dataclass(frozen=True)
class Embeddings:
    """A vector of each text, in their order."""

    vectors: tuple[tuple[float, ...], ...]
    num_prompt_tokens: int
    num_completion_tokens: int = 0


@dataclass(eq=False)
class _Failure(Exception):
    """One try that failed."""

    kind: str
    message: str
    is_retried: bool
    retry_after_s: float | None = None


@dataclass
class Endpoint:
    """One model of one endpoint in one role. Use as an async context, so that its connections are closed."""

    config: EndpointConfig
    role: str
    read_blob: ReadBlob
    record: Record
    cycle_id: str | None = None
    clock: Clock = time.monotonic
    sleep: Sleep = asyncio.sleep
    until_allowed: Callable[[], Awaitable[None]] | None = None
    """Waited for before each try: a paused learner asks nobody."""
    _client: Any = None
    _num_failures: int = 0
    """In a row."""
    _jitter: random.Random = field(default_factory=lambda: random.Random(0))

    async def __aenter__(self) -> Endpoint:
        """Connect. Raises StageFailedError where the SDK or the key is missing."""
        self._client = connect(self.config, self.role)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._requests = Window(self.config.requests_per_minute, self.clock, self.sleep)
        self._tokens = Window(self.config.tokens_per_minute, self.clock, self.sleep)
        self._gate = Gate(self.clock, self.sleep)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def sample(self, prompt: Prompt, sampling: Sampling, *, adapter: str) -> Samples:
        """`sampling.n` answers; an endpoint has no adapters, and no token ids.

        Raises ContextOverflowError; EndpointError where the call failed after its retries; StageFailedError where
        the configuration is wrong or the endpoint is down.
        """
        expected = num_text_chars(prompt) // CHARS_PER_TOKEN + sampling.max_tokens * sampling.n

        async def ask() -> Samples:
            return read_completion(await self._ask(lambda: self._client.chat.completions.create(**asked)))

        odds = {"logprobs": True, "top_logprobs": min(20, sampling.top_logprobs)} if sampling.top_logprobs else {}
        asked = {
            "model": self.config.model,
            "messages": to_openai(prompt, self.read_blob),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "n": sampling.n,
            "seed": sampling.seed,
            **(odds if self.config.has_logprobs else {}),
        }
        return await self._answered(ask, expected)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """A vector for each text. Raises as `sample` does."""

        async def ask() -> Embeddings:
            asked = {"model": self.config.model, "input": list(texts), "encoding_format": "float"}
            return read_embeddings(await self._ask(lambda: self._client.embeddings.create(**asked)), len(texts))

        return await self._answered(ask, sum(map(len, texts)) // CHARS_PER_TOKEN)

    async def _answered(self, ask: Callable[[], Awaitable[C]], expected: int) -> C:
        """Try until there is an answer, within the limits, and record what it took."""
        started, tries = time.monotonic(), 0
        async with self._slots:
            while True:
                tries += 1
                try:
                    answer = await self._try(ask, expected)
                except _Failure as failure:
                    if failure.is_retried and tries <= self.config.max_retries:
                        self._gate.shut(self._delay_s(failure, tries))
                        logger.debug("event=endpoint_retried role=%s kind=%s try=%d", self.role, failure.kind, tries)
                        continue
                    await self.record(self._call(failure.kind, tries, None, started))
                    raise self._error(failure) from None
                self._num_failures = 0
                await self.record(self._call("", tries, answer, started))
                return answer

    async def _try(self, ask: Callable[[], Awaitable[C]], expected: int) -> C:
        if self.until_allowed is not None:
            await self.until_allowed()
        await self._requests.take(1)
        await self._tokens.take(expected)
        await self._gate.passed()
        answer = await ask()
        self._tokens.correct(answer.num_prompt_tokens + answer.num_completion_tokens - expected)
        return answer

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        import openai

        try:
            return await call()
        except openai.APITimeoutError:
            raise _Failure("timeout", f"no answer within {self.config.timeout_s:g} s", True) from None
        except openai.APIStatusError as error:
            raise _status_failure(error) from None
        except (openai.APIError, ValueError) as error:
            # The connection broke, also in the middle of an answer, or what came is not JSON.
            raise _Failure("broken", f"{type(error).__name__}: {error}", True) from None

    def _delay_s(self, failure: _Failure, tries: int) -> float:
        """As long as the endpoint asks for, else doubling, with a jitter so that callers do not return together."""
        if failure.retry_after_s is not None:
            return failure.retry_after_s
        return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (tries - 1)) * (0.5 + self._jitter.random() / 2))

    def _error(self, failure: _Failure) -> Exception:
        who = f"{self.config.model} at {self.config.base_url} ({self.role})"
        if failure.kind == "context":
            return ContextOverflowError("messages", f"{who}: {failure.message}")
        if failure.kind == "refused":
            return StageFailedError(f"{who} refuses: {failure.message}; see the role's base_url, model and key_env")
        self._num_failures += 1
        if self._num_failures >= self.config.max_failures:
            return StageFailedError(
                f"{who}: {self._num_failures} calls in a row failed, the last with {failure.message}: "
                "start the cycle again when the endpoint answers, or raise max_failures"
            )
        return EndpointError(f"{who}: {failure.message}")

    def _call(self, error: str, tries: int, answer: Counted | None, started: float) -> EndpointCall:
        prompt_tokens = answer.num_prompt_tokens if answer else 0
        completion_tokens = answer.num_completion_tokens if answer else 0
        cost = prompt_tokens * self.config.prompt_price + completion_tokens * self.config.completion_price
        return EndpointCall(
            cycle_id=self.cycle_id,
            role=self.role,
            base_url=self.config.base_url,
            model=self.config.model,
            error=error,
            num_tries=tries,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost=cost / 1e6,
            duration_s=time.monotonic() - started,
        )


def connect(config: EndpointConfig, role: str) -> Any:
    """An `openai.AsyncOpenAI`. Raises StageFailedError where the SDK or the key is missing."""
    try:
        import openai
    except ImportError as error:
        raise StageFailedError(
            f"the {role} is an endpoint, which needs the OpenAI SDK: pip install 'nightschool[endpoint]'"
        ) from error
    key = os.environ.get(config.key_env)
    if not key:
        raise StageFailedError(
            f"the environment variable {config.key_env} (endpoint.key_env of the {role}) is not set: "
            "export the endpoint's key, or any text where it needs none"
        )
    return openai.AsyncOpenAI(base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=0)


def read_completion(completion: Any) -> Samples:
    """What the endpoint answered. Raises the failure of a try where it is not a chat completion."""
    try:
        answers = tuple(_answer(choice) for choice in completion.choices)
        usage = completion.usage
        prompt_tokens, completion_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        if not answers:
            raise ValueError("no choices")
        return Samples(answers, int(prompt_tokens), int(completion_tokens))
    except (AttributeError, TypeError, ValueError) as error:
        raise _Failure("broken", f"the answer is no chat completion: {error}", True) from None


def read_embeddings(response: Any, num_texts: int) -> Embeddings:
    """What the endpoint answered. Raises the failure of a try where it is not one vector a text, all of one length."""
    try:
        entries = sorted(response.data, key=lambda entry: entry.index)
        vectors = tuple(tuple(float(value) for value in entry.embedding) for entry in entries)
        if len(vectors) != num_texts or len({len(vector) for vector in vectors}) != 1 or not vectors[0]:
            raise ValueError(f"{len(vectors)} vectors for {num_texts} texts")
        return Embeddings(vectors, int(response.usage.prompt_tokens) if response.usage else 0)
    except (AttributeError, TypeError, ValueError) as error:
        raise _Failure("broken", f"the answer holds no embeddings: {error}", True) from None


def _answer(choice: Any) -> Sample:
    content = choice.logprobs.content if choice.logprobs is not None else None
    return Sample(
        text=choice.message.content or "",
        token_ids=(),
        logprobs=tuple(entry.logprob for entry in content or ()),
        top_logprobs=tuple(
            tuple(TopLogprob(-1, top.token, top.logprob) for top in entry.top_logprobs) for entry in content or ()
        ),
        finish_reason="length" if choice.finish_reason == "length" else "stop",
    )


def _status_failure(error: Any) -> _Failure:
    status, body = int(error.status_code), str(error.message)[:200]
    message = f"HTTP {status}: {body}"
    if status in FATAL_STATUSES:
        return _Failure("refused", message, False)
    if getattr(error, "code", None) == "context_length_exceeded":
        return _Failure("context", message, False)
    if status in RETRIED_STATUSES or status >= 500:
        retry_after_s = _retry_after_s(error.response.headers)
        is_retried = retry_after_s is None or retry_after_s <= MAX_RETRY_AFTER_S
        return _Failure(f"http_{status}", message, is_retried, retry_after_s)
    return _Failure(f"http_{status}", message, False)


def _retry_after_s(headers: Any) -> float | None:
    """Seconds that the endpoint asks to wait; a date, which is rare, counts as not said."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    return None
