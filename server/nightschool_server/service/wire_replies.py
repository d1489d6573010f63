"""The server's types as they go onto the wire: answers, deltas, tokens, usage, messages.

The inverse of `wire.py`. Owns no decision but one: an answer that holds tool calls ends with TOOL_CALLS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp
from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import chat, engine
from nightschool_server.agent.call_forms import HERMES, CallForm
from nightschool_server.agent.toolcalls import ParsedAnswer

FINISH_REASONS: dict[engine.FinishReason, content_pb2.FinishReason.ValueType] = {
    "stop": content_pb2.STOP,
    "length": content_pb2.LENGTH,
    "cancelled": content_pb2.CANCELLED,
}

ROLES: dict[chat.Role, content_pb2.Message.Role.ValueType] = {
    "system": content_pb2.Message.SYSTEM,
    "user": content_pb2.Message.USER,
    "assistant": content_pb2.Message.ASSISTANT,
    "tool": content_pb2.Message.TOOL,
}


@dataclass
class AnswerSoFar:
    """One of the n answers while it is sampled."""

    index: int
    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    tokens: content_pb2.Tokens = field(default_factory=content_pb2.Tokens)
    finish_reason: engine.FinishReason | None = None

    @property
    def text(self) -> str:
        """What was sampled up to now."""
        return "".join(self.texts)


@dataclass
class AnswersSoFar:
    """The answers of one request, gathered from the engine's deltas."""

    n: int
    logprobs: bool
    form: CallForm = HERMES
    """How the model writes tool calls."""
    tools: Sequence[chat.ToolSpec] = ()
    answers: list[AnswerSoFar] = field(init=False)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def __post_init__(self) -> None:
        self.answers = [AnswerSoFar(index) for index in range(self.n)]

    def add(self, delta: engine.Delta) -> AnswerSoFar:
        """Take one delta in; returns the answer that it belongs to."""
        answer = self.answers[delta.index]
        answer.texts.append(delta.text)
        answer.num_tokens += len(delta.token_ids)
        if self.logprobs:
            add_tokens(answer.tokens, delta)
        if delta.finish_reason is not None:
            answer.finish_reason = delta.finish_reason
        self.num_prompt_tokens = max(self.num_prompt_tokens, delta.num_prompt_tokens)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        return answer

    def usage(self) -> content_pb2.Usage:
        """Tokens of the prompt, counted once, and of every answer."""
        return content_pb2.Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=sum(answer.num_tokens for answer in self.answers),
            cached_tokens=self.num_cached_tokens,
        )

    def finished(self, answer: AnswerSoFar) -> content_pb2.Answer:
        """The whole answer as it goes onto the wire."""
        parsed = self.form.read(answer.text, self.tools)
        return answer_to_proto(answer, parsed, with_tokens=self.logprobs)


def answer_to_proto(answer: AnswerSoFar, parsed: ParsedAnswer, *, with_tokens: bool) -> content_pb2.Answer:
    """The answer with the tool calls that were taken out of its markup; the text stays verbatim."""
    reason = FINISH_REASONS[answer.finish_reason or "cancelled"]
    if parsed.calls and reason == content_pb2.STOP:
        reason = content_pb2.TOOL_CALLS
    return content_pb2.Answer(
        index=answer.index,
        text=answer.text,
        tool_calls=[tool_call_to_proto(call) for call in parsed.calls],
        tool_call_error=parsed.error or "",
        finish_reason=reason,
        tokens=answer.tokens if with_tokens else None,
    )


def add_tokens(tokens: content_pb2.Tokens, delta: engine.Delta) -> None:
    """Append a delta's token ids and logprobs."""
    tokens.ids.extend(delta.token_ids)
    tokens.logprobs.extend(delta.logprobs)
    for position in delta.top_logprobs:
        tokens.top.add(
            ids=[top.token_id for top in position],
            texts=[top.token for top in position],
            logprobs=[top.logprob for top in position],
        )


def merged_deltas(deltas: Sequence[engine.Delta], *, logprobs: bool) -> list[agent_pb2.Delta]:
    """The deltas that one wake-up found, joined to one for each answer; empty ones are left out."""
    joined: dict[int, agent_pb2.Delta] = {}
    for delta in deltas:
        entry = joined.setdefault(delta.index, agent_pb2.Delta(index=delta.index))
        entry.text += delta.text
        if logprobs:
            add_tokens(entry.tokens, delta)
    return [entry for entry in joined.values() if entry.text or entry.tokens.ids]


def tool_call_to_proto(call: chat.ToolCall) -> content_pb2.ToolCall:
    """A tool call."""
    return content_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments)


def tool_result_to_proto(result: chat.ToolResult) -> content_pb2.ToolResult:
    """What a tool gave back."""
    return content_pb2.ToolResult(
        call_id=result.call_id,
        name=result.name,
        content=result.content,
        is_error=result.is_error,
        images=[content_pb2.Image(sha256=sha256) for sha256 in result.images],
        files=[file_to_proto(file) for file in result.files],
        simulated=result.simulated,
    )


def file_to_proto(file: chat.File) -> content_pb2.File:
    """A file, by its sha256."""
    return content_pb2.File(name=file.name, media_type=file.media_type, sha256=file.sha256, size_bytes=file.size_bytes)


def message_to_proto(message: chat.Message) -> content_pb2.Message:
    """One turn; images go by their sha256."""
    return content_pb2.Message(role=ROLES[message.role], parts=[_part_to_proto(part) for part in message.parts])


def messages_to_proto(messages: Iterable[chat.Message]) -> list[content_pb2.Message]:
    """The turns."""
    return [message_to_proto(message) for message in messages]


def timestamp(seconds: float | None) -> Timestamp | None:
    """Unix seconds as a Timestamp; None stays absent."""
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1_000_000) * 1000)
    return stamp


def _part_to_proto(part: chat.Part) -> content_pb2.Part:
    match part:
        case chat.Text(text):
            return content_pb2.Part(text=text)
        case chat.Image(sha256):
            return content_pb2.Part(image=content_pb2.Image(sha256=sha256))
        case chat.File():
            return content_pb2.Part(text=part.line)
        case chat.ToolCall():
            return content_pb2.Part(tool_call=tool_call_to_proto(part))
        case chat.ToolResult():
            return content_pb2.Part(tool_result=tool_result_to_proto(part))
