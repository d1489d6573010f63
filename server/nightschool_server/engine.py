"""The engine seam: what the server asks of whatever runs the model.

An engine renders prompts with the model's chat template, runs many requests at once, each on its own
adapter, streams tokens as they are sampled, and scores given tokens. It knows adapters only as
(name, folder): names are never reused, states and leases belong to the registry. Implementations live
in `engines/`, one file each; all pass `tests/server/test_engine.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from nightschool_server.chat import Message, ToolSpec

BASE = "base"
"""The adapter name that means no LoRA at all."""

FinishReason = Literal["stop", "length", "cancelled"]

ToolChoice = Literal["auto", "required"]
"""Whether an answer may call tools, or is calls and nothing else."""

LIVE_PRIORITY = 0
"""Requests of people and applications."""

PRACTICE_PRIORITY = 10
"""The learner's requests: scheduled only after every waiting live request."""


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes (PNG, JPEG, ...) of every image that the messages name, by sha256."""
    tool_choice: ToolChoice = "auto"
    """Read by `generate` alone."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """Sample i of a request draws from the stream of seed + i, whatever shares its batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    n: int = 1
    logprobs: bool = False
    """Whether deltas carry the logprob of each sampled token: of the untempered distribution, over the tokens that a
    guided answer leaves."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each position; a guided answer may leave fewer."""
    ignore_eos: bool = False
    """For measurements: run to max_tokens."""
    special_tokens: bool = False
    """Whether the text shows special tokens, but for those that end the answer: some models mark calls with them."""


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Delta:
    """What was newly sampled for one of the n answers."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last delta of this index."""
    num_prompt_tokens: int = 0
    """Set on every delta."""
    num_cached_tokens: int = 0
    """How many of the prompt's tokens came from the prefix cache."""


@dataclass(frozen=True)
class GenerateRequest:
    """One request to the engine."""

    request_id: str
    prompt: Prompt
    sampling: Sampling
    adapter: str = BASE
    priority: int = LIVE_PRIORITY
    """Lower runs first."""


@dataclass(frozen=True)
class Scores:
    """Logprobs of a given continuation under a prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class ModelInfo:
    """The base model as served."""

    name: str
    digest: str
    """sha256 over the weights' and the configuration's files."""
    chat_template_digest: str
    context_length: int
    """Tokens of prompt and answer together."""
    accepts_images: bool
    max_lora_rank: int


@dataclass(frozen=True)
class EngineStats:
    """Counts since start and sizes now."""

    num_running: int
    num_waiting: int
    num_generated_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    adapters: tuple[str, ...]
    """Loaded now, BASE not among them."""
    merged: str = BASE
    """The adapter that runs merged into the weights now; see `Engine.merge_adapter`."""
    busy_s: float = 0.0
    """Wall time in which it worked, since the start; it only ever grows. Over the time between two looks: how busy it
    was. transformers: in steps; vLLM: with a request running or waiting."""


class Engine(Protocol):
    """Runs the model. Every method may be called from the event loop that made the engine."""

    @property
    def kind(self) -> str:
        """The engine's name in the configuration: `vllm` or `transformers`."""
        ...

    @property
    def model(self) -> ModelInfo:
        """What is served."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Stream the n answers of one request as they are sampled.

        Where a tool of the prompt is strict, or a call is required, the answers are guided: see `engines/guidance.py`.
        Closing the iterator or cancelling its task aborts the request at the engine's next step.
        Raises InvalidRequestError (an image that does not decode, a template that refuses the
        messages, a schema that cannot be guided), ContextOverflowError, UnknownAdapterError before the first delta, and
        EngineDeadError and EngineAsleepError at any time.
        """
        ...

    async def score(self, prompt: Prompt, continuation: str, *, adapter: str = BASE, priority: int = 0) -> Scores:
        """Logprobs [num_tokens] of `continuation` as the assistant's answer to `prompt`."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make the PEFT safetensors in `folder` servable as `name` while others generate.

        Raises AdapterFormatError. Loading a name that is already loaded is an error: names are
        never reused.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget `name`. The caller guarantees that no request holds it.

        Raises FailedPreconditionError where it is the merged one: merge another first.
        """
        ...

    async def merge_adapter(self, name: str) -> None:
        """Run `name` at the base model's speed, by merging it into a copy of the weights; BASE undoes it.

        Everything else, the base included, stays exact as a low-rank correction. Requests in flight are not
        disturbed. Raises UnknownAdapterError, FailedPreconditionError where the lane is switched off.
        """
        ...

    async def sleep(self) -> None:
        """Give the device's memory to others: refuse requests from now on, wait for those in flight, then let go.

        Requests meanwhile raise EngineAsleepError, and `healthy` is False. Raises FailedPreconditionError where the
        engine cannot, or sleeps already.
        """
        ...

    async def wake(self) -> None:
        """Serve again with the adapters and the merged one of before, proven; nothing where it is awake."""
        ...

    def stats(self) -> EngineStats:
        """Counters for status and metrics; cheap."""
        ...

    def healthy(self) -> bool:
        """Whether the engine still steps."""
        ...

    async def close(self) -> None:
        """Abort what runs and free the model."""
        ...
