"""How a model writes what it wants done: the action-format seam, and the format of tool calls.

A format reads a step's text, says how to write one, and what makes two steps the same. What it reads are calls, which
an executor runs; `loop.py` moves both. Live serving, practice and evaluation use the one that the configuration names.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from nightschool_server.agent.call_forms import FORMS, HERMES, CallForm, strict_fault
from nightschool_server.agent.calls import OnEvent
from nightschool_server.agent.code import CodeFormat
from nightschool_server.agent.episode import Limits
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.toolcalls import ParsedAnswer
from nightschool_server.chat import Message, ToolSpec, canonical_json
from nightschool_server.config.serving import AgentConfig
from nightschool_server.engine import ToolChoice
from nightschool_server.errors import InvalidRequestError
from nightschool_server.sandbox.proof import open_sandbox


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

    def parse(self, text: str, tools: Sequence[ToolSpec] = ()) -> ParsedAnswer:
        """Take a step's calls, of these tools, out of its text. Never raises."""
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

    def check(self, tools: Sequence[ToolSpec]) -> None:
        """Raise AppError where the tools cannot be offered together in this format."""
        ...

    def shown(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The tools that the chat template writes into the prompt."""
        ...

    def executor(self, tools: ToolExecutor, limits: Limits, on_event: OnEvent) -> ToolExecutor:
        """Who runs the calls of one step, where `tools` runs the application's and the caller's."""
        ...


@dataclass(frozen=True)
class ToolCallFormat:
    """Tool calls as markup in the text (`call_forms.py`); the chat template tells the model of tools and form."""

    name: str = "tool_calls"
    answers_in_text: bool = True
    form: CallForm = HERMES

    @property
    def hint(self) -> str:
        return self.form.hint

    def parse(self, text: str, tools: Sequence[ToolSpec] = ()) -> ParsedAnswer:
        return self.form.read(text, tools)

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

    def check(self, tools: Sequence[ToolSpec]) -> None:
        pass

    def shown(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        return tuple(tools)

    def executor(self, tools: ToolExecutor, limits: Limits, on_event: OnEvent) -> ToolExecutor:
        return tools


TOOL_CALLS = ToolCallFormat()


def call_form(config: AgentConfig) -> CallForm:
    """How the model writes tool calls; `auto` is hermes here, see `call_form_choice.py`."""
    return FORMS.get(config.tool_call_format, HERMES)


def check_form(form: CallForm, tools: Sequence[ToolSpec], *, tool_choice: ToolChoice = "auto") -> None:
    """Raise InvalidRequestError where answers would have to be guided in a form that cannot be."""
    if fault := strict_fault(form, tools):
        raise InvalidRequestError("tools", fault)
    if tool_choice == "required" and not form.can_be_guided:
        raise InvalidRequestError(
            "tool_choice",
            f"tool_choice is REQUIRED, but calls are written as {form.name} (agent.tool_call_format), and only calls "
            "as hermes can be guided: send AUTO",
        )


def action_format(config: AgentConfig) -> ActionFormat:
    """The format that the configuration names, to read steps with."""
    return ToolCallFormat(form=call_form(config)) if config.action_format == "tool_calls" else CodeFormat()


@asynccontextmanager
async def open_format(config: AgentConfig) -> AsyncIterator[ActionFormat]:
    """The format that the configuration names, to run steps with for as long as the block runs.

    Raises FailedPreconditionError where it is code and there is no sandbox for it.
    """
    if config.action_format == "code":
        async with open_sandbox(config.code, unsafe=config.unsafe_code) as sandbox:
            yield CodeFormat(sandbox, config.max_output_chars)
    else:
        yield action_format(config)
