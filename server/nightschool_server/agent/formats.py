"""How a model writes what it wants done: the action-format seam, and the format of tool calls.

A format is pure: it reads a step's text, says how to write one, and what makes two steps the same. What it reads are
calls, which an executor runs; `loop.py` moves both. Live serving, practice and evaluation use the one that the
configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nightschool_server.agent.toolcalls import CLOSE, OPEN, ParsedAnswer, parse_answer
from nightschool_server.chat import Message, ToolSpec, canonical_json
from nightschool_server.config.serving import AgentConfig


class ActionFormat(Protocol):
    """One way of writing actions."""

    @property
    def name(self) -> str:
        """As the configuration calls it."""
        ...

    @property
    def hint(self) -> str:
        """How to write a step, said behind what is wrong with one."""
        ...

    @property
    def answers_in_text(self) -> bool:
        """Whether a step without a call is the final answer; else only a call can end the task, and it is malformed."""
        ...

    def parse(self, text: str) -> ParsedAnswer:
        """Take a step's calls out of its text. Never raises."""
        ...

    def key(self, text: str) -> str:
        """Equal for two steps that do the same."""
        ...

    def tool_of(self, text: str) -> str:
        """The tool that a step calls first; empty for a final answer."""
        ...

    def begin(self, messages: tuple[Message, ...], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
        """The conversation that a task begins with, and in it what the model must be told of the format."""
        ...

    def shown(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The tools that the chat template writes into the prompt."""
        ...


@dataclass(frozen=True)
class ToolCallFormat:
    """Tool calls as markup in the text (`toolcalls.py`); the chat template tells the model of tools and form."""

    name: str = "tool_calls"
    hint: str = f'write a call as {OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}, or answer without one'
    answers_in_text: bool = True

    def parse(self, text: str) -> ParsedAnswer:
        return parse_answer(text)

    def key(self, text: str) -> str:
        parsed = self.parse(text)
        if parsed.error is None and parsed.calls:
            return canonical_json([[call.name, json.loads(call.arguments)] for call in parsed.calls])
        return " ".join(text.split())

    def tool_of(self, text: str) -> str:
        calls = self.parse(text).calls
        return calls[0].name if calls else ""

    def begin(self, messages: tuple[Message, ...], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
        return messages

    def shown(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        return tuple(tools)


TOOL_CALLS = ToolCallFormat()


def action_format(config: AgentConfig) -> ActionFormat:
    """The format that the configuration names."""
    return TOOL_CALLS
