"""What a conversation is made of and what a reply carries: the SDK's own frozen types.

Field names are those of `content.proto` and `agent.proto`, where each field is explained; `convert.py` reads
and writes them by name. Owns no behaviour beyond shortcuts; what a caller may pass instead of these types is
`messages.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

__all__ = [
    "Answer",
    "Delta",
    "File",
    "FinishReason",
    "Image",
    "LearningPolicy",
    "Message",
    "Model",
    "Outcome",
    "Part",
    "Priority",
    "Reply",
    "Role",
    "Started",
    "StreamEvent",
    "TaskEvent",
    "TaskResult",
    "Text",
    "Tokens",
    "ToolCall",
    "ToolCalled",
    "ToolResult",
    "ToolReturned",
    "TopLogprobs",
    "Usage",
]


class Role(StrEnum):
    """Who speaks."""

    UNSPECIFIED = "unspecified"
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class LearningPolicy(StrEnum):
    """What the server may do with a request once it is answered."""

    UNSPECIFIED = "unspecified"
    """The server's default."""
    TRAIN = "train"
    """Log it; the learner may use it."""
    LOG_ONLY = "log_only"
    """Log it; the learner never sees it."""
    NO_LOG = "no_log"
    """Keep nothing of its content."""


class ToolChoice(StrEnum):
    """Whether an answer may call tools."""

    UNSPECIFIED = "unspecified"
    AUTO = "auto"
    REQUIRED = "required"
    """The answer is one or more calls and nothing else."""


class Priority(StrEnum):
    """Which requests go first."""

    UNSPECIFIED = "unspecified"
    LIVE = "live"
    PRACTICE = "practice"
    """Runs when no live request waits; needs the admin scope."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """Why a task ended."""

    UNSPECIFIED = "unspecified"
    ANSWERED = "answered"
    MAX_STEPS = "max_steps"
    MAX_TOKENS = "max_tokens"
    MAX_TIME = "max_time"


@dataclass(frozen=True)
class Text:
    """A text part."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image part: encoded bytes, or the sha256 of bytes that the server already holds."""

    data: bytes = b""
    sha256: str = ""


@dataclass(frozen=True)
class File:
    """A file of a task: its bytes, or the sha256 of bytes that were uploaded or given back."""

    name: str
    """One name without a folder: the file's path in the task's workspace."""
    data: bytes = b""
    sha256: str = ""
    media_type: str = ""
    """Empty: guessed from the name."""
    size_bytes: int = 0
    """Of what the server gave back."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name. Raises ValueError for text that is not a JSON object."""
        value = json.loads(self.arguments_json or "{}")
        if not isinstance(value, dict):
            raise ValueError(f"the arguments of {self.name!r} are not a JSON object: {self.arguments_json}")
        return value


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back; an error is an observation like any other."""

    call_id: str
    name: str
    content: str
    is_error: bool = False
    images: tuple[Image, ...] = ()
    """The model sees them in front of the content."""
    files: tuple[File, ...] = ()
    """That a tool of the application gave back."""
    simulated: bool = False
    """Whether a simulator answered in the tool's place."""


Part = Text | Image | ToolCall | ToolResult


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Usage:
    """Tokens that a reply cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class TopLogprobs:
    """The likeliest tokens of one position."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Tokens:
    """The tokens of an answer as they were sampled, with the logprobs of the untempered distribution."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]


@dataclass(frozen=True)
class Answer:
    """One answer of a reply. `text` is verbatim, tool-call markup included."""

    index: int
    text: str
    tool_calls: tuple[ToolCall, ...]
    tool_call_error: str
    finish_reason: FinishReason
    tokens: Tokens | None

    @property
    def message(self) -> Message:
        """The answer as a turn of the conversation, to be sent with the next request."""
        return Message(Role.ASSISTANT, (Text(self.text),))


@dataclass(frozen=True)
class Scores:
    """How likely a given answer is."""

    adapter: str
    tokens: Tokens | None
    """Of the answer."""
    num_prompt_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Negative log-likelihood of the answer, mean over its tokens."""
        assert self.tokens is not None, "every score has its tokens"
        return -sum(self.tokens.logprobs) / len(self.tokens.logprobs)


@dataclass(frozen=True)
class Reply:
    """What one model call gave."""

    response_id: str
    """Names this reply in `feedback`."""
    adapter: str
    """Who answered; "base" for the model without an adapter."""
    answers: tuple[Answer, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first answer's tool calls."""
        return self.answers[0].tool_calls

    @property
    def message(self) -> Message:
        """The first answer as a turn of the conversation."""
        return self.answers[0].message


@dataclass(frozen=True)
class Started:
    """First event of every stream."""

    response_id: str
    adapter: str


@dataclass(frozen=True)
class Delta:
    """New text of the answer `index`, or of the step in progress."""

    index: int
    text: str
    tokens: Tokens | None


StreamEvent = Started | Delta | Answer | Reply
"""Events of `stream(...).events()`: each `Answer` when it is finished, the whole `Reply` last."""


@dataclass(frozen=True)
class ToolCalled:
    """The model called a tool, at the server or at the client."""

    call: ToolCall


@dataclass(frozen=True)
class ToolReturned:
    """A tool gave back a result."""

    result: ToolResult


@dataclass(frozen=True)
class TaskResult:
    """How a task ended."""

    response_id: str
    adapter: str
    outcome: Outcome
    answer: str
    num_steps: int
    usage: Usage
    messages: tuple[Message, ...]
    """All turns after the start, as the model saw them."""
    files: tuple[File, ...]
    """What the tools gave back as files; `client.download` fetches one."""


TaskEvent = Started | Delta | ToolCalled | ToolReturned | TaskResult
"""Events of `run_task`; the `TaskResult` is the last."""


@dataclass(frozen=True)
class Model:
    """The base model or one of its servable adapters."""

    name: str
    base_model: str
    active: bool
    context_length: int
    accepts_images: bool
    created_at: datetime | None
