"""Code as the form of actions: one block of Python a step that calls tools as functions (SPORT's, smolagents').

    ```python
    total = price("mug") * 3
    print(total)
    ```

Owns how a block is found, what the model is told of the form, what makes two blocks the same, and how the tools that a
block calls go through the ordinary executor. The code runs in a sandbox (`sandbox/`); a block is a call of the tool
`python` to the rest of the loop.

Deviations from the models: exactly one block is read; `final_answer` takes any value; `ToolError` can be caught.
"""

from __future__ import annotations

import builtins
import io
import json
import keyword
import math
import re
import time
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from nightschool_server.agent.calls import OnEvent, StepCalls
from nightschool_server.agent.episode import Limits
from nightschool_server.agent.executors import ToolExecutor
from nightschool_server.agent.signatures import functions_of, signature
from nightschool_server.agent.toolcalls import MAX_ANSWER_CHARS, ParsedAnswer, checked_call
from nightschool_server.chat import Message, Text, ToolCall, ToolSpec, canonical_json, system
from nightschool_server.sandbox.sandbox import CodeResult, CodeStep, Reply, Sandbox
from nightschool_server.tools.call import truncate
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolFailure, ToolOutcome

CODE_TOOL = "python"
"""What a block is called among calls."""

MAX_CODE_CHARS = 100_000
CODE_HINT = "write one block of Python between ```python and ```; end with final_answer(value)"

_OPENINGS = (("```python", "\n```"), ("```py", "\n```"), ("<code>", "</code>"))
_IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_SHAPE = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}

INSTRUCTIONS = """Act by writing Python. Each step is one block:

```python
# your code
```

You are shown what the code prints and the value of its last expression. Variables are kept for the next steps; the \
current folder is yours. {tools}

When you know the answer, call final_answer(value): it ends the task."""
HAS_TOOLS = "These functions can be called, and raise ToolError where they fail:\n\n{signatures}"
NO_TOOLS = "There are no other functions than Python's own."


@dataclass(frozen=True)
class CodeFormat:
    """Actions as blocks of Python."""

    sandbox: Sandbox | None = None
    """What runs them; None where steps are only read."""
    max_output_chars: int = 4000
    name: str = "code"
    hint: str = CODE_HINT
    answers_in_text: bool = False

    def parse(self, text: str, tools: Sequence[ToolSpec] = ()) -> ParsedAnswer:
        if len(text) > MAX_ANSWER_CHARS:
            return ParsedAnswer("", (), f"the answer has {len(text)} characters; at most {MAX_ANSWER_CHARS} are read")
        try:
            outside, code = _block(text)
        except ValueError as error:
            return ParsedAnswer("", (), str(error))
        if code is None:
            return ParsedAnswer(outside, (), None)
        arguments = json.dumps({"code": code.encode("utf-8", "replace").decode()}, ensure_ascii=False)
        return ParsedAnswer(outside, (ToolCall("call_0", CODE_TOOL, arguments),), None)

    def key(self, text: str) -> str:
        code = self._code(text)
        return " ".join(text.split()) if code is None else normalised(code)

    def tool_of(self, text: str) -> str:
        code = self._code(text)
        return "" if code is None else _first_call(code)

    def begin(self, messages: tuple[Message, ...], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
        told = instructions(tools)
        if messages[0].role != "system":
            return (system(told), *messages)
        return (Message("system", (*messages[0].parts, Text(f"\n\n{told}"))), *messages[1:])

    def check(self, tools: Sequence[ToolSpec]) -> None:
        functions_of(tools)

    def shown(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        return ()

    def executor(self, tools: ToolExecutor, limits: Limits, on_event: OnEvent) -> ToolExecutor:
        assert self.sandbox is not None, "a format that runs steps was opened with `open_format`"
        return CodeExecutor(self, self.sandbox, tools, limits=limits, on_event=on_event)

    def _code(self, text: str) -> str | None:
        calls = self.parse(text).calls
        return cast(str, json.loads(calls[0].arguments)["code"]) if calls else None


class CodeExecutor:
    """Runs the block of one step, and for it the tools."""

    def __init__(
        self, written: CodeFormat, sandbox: Sandbox, tools: ToolExecutor, *, limits: Limits, on_event: OnEvent
    ) -> None:
        self._max_output_chars = written.max_output_chars
        self._sandbox = sandbox
        self._executor = tools
        self._limits = limits
        self._on_event = on_event
        self.tools = tools.tools

    def is_read_only(self, name: str) -> bool:
        return name != CODE_TOOL and self._executor.is_read_only(name)

    async def run(self, call: ToolCall, state: ToolState, *, max_s: float = math.inf) -> ToolOutcome:
        assert call.name == CODE_TOOL, "a block is the only call of its step"
        began = time.perf_counter()
        here = state if state.workspace is not None else replace(state, workspace=state.make_workspace())
        assert here.workspace is not None
        limits = replace(self._limits, max_tool_s=min(max_s, self._limits.max_tool_s))
        calls = _Calls(call.id, self._executor, here, limits=limits, on_event=self._on_event)
        step = CodeStep(
            code=json.loads(call.arguments)["code"],
            functions=functions_of(self.tools),
            variables=state.variables,
            workspace=here.workspace,
            max_output_chars=self._max_output_chars,
        )
        try:
            result = await self._sandbox.run(step, calls.answer, max_s)
        except BaseException:
            if state.workspace is None:
                here.discard()
            raise
        after = replace(calls.state, variables=result.variables)
        if state.workspace is None and after.workspace is not None and not any(after.workspace.iterdir()):
            after.discard()
            after = replace(after, workspace=None)
        return calls.outcome(result, after, max_chars=self._max_output_chars, began=began)


class _Calls:
    """The tool calls of one block, in the order in which the code makes them."""

    def __init__(
        self, call_id: str, executor: ToolExecutor, state: ToolState, *, limits: Limits, on_event: OnEvent
    ) -> None:
        self._call_id = call_id
        self._calls = StepCalls(executor, state, limits, on_event)
        self._max_calls = limits.max_calls
        self._num_calls = 0
        self._outcomes: list[ToolOutcome] = []

    @property
    def state(self) -> ToolState:
        return self._calls.state

    async def answer(self, name: str, arguments: Any) -> Reply | None:
        """Run a call that the code asks for; None where it asks again and again beyond the limit."""
        self._num_calls += 1
        if self._num_calls > self._max_calls:
            fault = f"error: this step has made {self._max_calls} tool calls; at most {self._max_calls} are allowed"
            return Reply(fault, True, False) if self._num_calls <= 2 * self._max_calls else None
        try:
            call = checked_call({"name": name, "arguments": arguments}, f"{self._call_id}.{self._num_calls}")
        except ValueError as error:
            return Reply(f"error: {error}", True, False)
        outcome = await self._calls.run(call)
        self._outcomes.append(outcome)
        return Reply(outcome.content, outcome.is_error, outcome.is_json)

    def outcome(self, result: CodeResult, state: ToolState, *, max_chars: int, began: float) -> ToolOutcome:
        """The block as one call of a tool. Where practice may not run a tool of it, that is not the model's fault."""
        is_refused = any(outcome.failure == "refused" for outcome in self._outcomes)
        failure = cast(ToolFailure, "refused" if is_refused else result.failure)
        return ToolOutcome(
            content=observation(result, max_chars),
            is_error=bool(failure),
            failure=failure,
            state=state,
            duration_s=time.perf_counter() - began,
            images={sha256: data for outcome in self._outcomes for sha256, data in outcome.images.items()},
            simulated=any(outcome.simulated for outcome in self._outcomes),
            files=tuple(file for outcome in self._outcomes for file in outcome.files),
            answer=None if failure else result.answer,
        )


def instructions(tools: Sequence[ToolSpec]) -> str:
    """What the model is told of the form and of the functions that it may call."""
    if not tools:
        return INSTRUCTIONS.format(tools=NO_TOOLS)
    stubs = [signature(tool, function) for tool, function in zip(tools, functions_of(tools), strict=True)]
    return INSTRUCTIONS.format(tools=HAS_TOOLS.format(signatures="\n\n".join(stubs)))


def observation(result: CodeResult, max_chars: int) -> str:
    """What the model sees of a step."""
    parts = []
    if output := result.output.rstrip():
        cut = result.num_chars > len(result.output)
        mark = f"\n[truncated: {len(result.output)} of {result.num_chars} characters]" if cut else ""
        parts.append(f"{output}{mark}")
    if result.fault:
        parts.append(f"error: {truncate(result.fault, max_chars)}")
    if result.failure == "parse":
        parts[-1] += f"; {CODE_HINT}"
    if result.answer is not None:
        parts.append(f"final answer: {truncate(result.answer, max_chars)}")
    if result.lost:
        parts.append("not kept: " + "; ".join(f"{name} ({why})" for name, why in result.lost.items()))
    return "\n".join(parts) or "done: the code printed nothing"


def normalised(code: str) -> str:
    """The code without comments, blank lines and the spacing that means nothing; itself where it is not Python."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return " ".join(code.split())
    kept = [token for token in tokens if token.type not in _IGNORED]
    return canonical_json([tokenize.tok_name[t.type] if t.type in _SHAPE else t.string for t in kept])


def _first_call(code: str) -> str:
    """The first function that the code calls by its plain name and that is neither Python's own nor the end."""
    names = re.finditer(r"(?<![\w.])([A-Za-z_]\w*)\s*\(", code)
    found = (name.group(1) for name in names if not re.search(r"\b(def|class)\s+$", code[: name.start(1)][-16:]))
    known = {*dir(builtins), *keyword.kwlist, "final_answer"}
    return next((name for name in found if name not in known), "")


def _block(text: str) -> tuple[str, str | None]:
    """The text outside the one block and the code inside; None where there is no block. Raises ValueError."""
    found = [(start, opening, closing) for opening, closing in _OPENINGS if (start := text.find(opening)) >= 0]
    if not found:
        return text.strip(), None
    start, opening, closing = min(found, key=lambda one: (one[0], -len(one[1])))
    begin = start + len(opening)
    end = text.find(closing, begin)
    if end < 0:
        raise ValueError(f"the block that {opening} opens is not closed")
    behind = text[end + len(closing) :]
    if any(other in behind for other, _ in _OPENINGS):
        raise ValueError("the step has more than one block of code")
    code = text[begin:end].strip("\n").rstrip()
    if len(code) > MAX_CODE_CHARS:
        raise ValueError(f"the code has {len(code)} characters; at most {MAX_CODE_CHARS} are run")
    if not code.strip():
        raise ValueError("the block of code is empty")
    return f"{text[:start]}{behind}".strip(), code
