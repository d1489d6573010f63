"""What runs inside the sandbox: one step of code, then the process is gone.

Started as a script by a bare Python that sees this file, the interpreter and the installed packages; it imports
nothing of nightschool. Owns how the code is run, what it prints, how it calls tools, and which variables are kept.
Nothing here protects the server: the code shares this process and may do to it what it likes. What protects is
around the process (`process.py`, `bubblewrap.py`, `seccomp.py`) and in what the server takes from the socket.

    frame: 4 bytes JSON length, 4 bytes payload length, JSON, payload
    in     {"code", "tools", "limits", "max_output_chars", "max_variables_bytes"}; payload: the variables so far
    out    {"call": name, "arguments"}, in {"content", "is_error", "is_json"}: as often as the code calls
    out    {"output", "num_chars", "failure", "fault", "answer", "lost"}; payload: the variables from now on
"""

from __future__ import annotations

import builtins
import io
import json
import os
import resource
import sys
import threading
import types
from _ast import Expr, Expression, PyCF_ONLY_AST
from collections.abc import Mapping
from typing import Any, NoReturn

CODE_NAME = "<code>"
MAX_FAULT_CHARS = 1000


class ToolError(Exception):
    """What a tool raises in the code."""


class _FinalAnswer(BaseException):
    """Ends the code; not an Exception, so that `except Exception` lets it pass."""


class _TooLargeError(Exception):
    """The variables do not fit."""


class Peer:
    """The server's socket, one frame at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next frame; ends the process where the server is gone."""
        header = self._read(8)
        value = json.loads(self._read(int.from_bytes(header[:4], "big")))
        return value, self._read(int.from_bytes(header[4:], "big"))

    def send(self, value: Mapping[str, Any], payload: bytes = b"") -> None:
        """Send a frame, whole."""
        body = json.dumps(value).encode()
        rest = memoryview(len(body).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + body + payload)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def ask(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Send a frame and wait for its answer; threads take turns."""
        with self._lock:
            self.send(value)
            return self.receive()[0]

    def _read(self, size: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < size:
            chunk = os.read(self._descriptor, size - len(chunks))
            if not chunk:
                os._exit(1)
            chunks += chunk
        return bytes(chunks)


class Tool:
    """A tool as the code calls it: by name or by position, in the order that the prompt shows."""

    def __init__(self, peer: Peer, name: str, tool: str, parameters: list[str]) -> None:
        self._peer = peer
        self.__name__ = name
        self._tool = tool
        self._parameters = parameters

    def __call__(self, *values: Any, **named: Any) -> Any:
        if len(values) > len(self._parameters):
            raise TypeError(f"{self.__name__}() takes {len(self._parameters)} arguments, {len(values)} were given")
        placed = dict(zip(self._parameters, values, strict=False))
        if twice := sorted(placed.keys() & named.keys()):
            raise TypeError(f"{self.__name__}() got {twice[0]!r} twice")
        arguments = json.loads(json.dumps({**placed, **named}, default=_as_json))
        reply = self._peer.ask({"call": self._tool, "arguments": arguments})
        if reply["is_error"]:
            raise ToolError(reply["content"].removeprefix("error: "))
        return json.loads(reply["content"]) if reply["is_json"] else reply["content"]

    def __repr__(self) -> str:
        return f"<tool {self.__name__}({', '.join(self._parameters)})>"


class Output(io.TextIOBase):
    """What the code prints: the first `max_chars` characters, and how many there were."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._kept: list[str] = []
        self.num_chars = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        room = self._max_chars - self.num_chars
        if room > 0:
            self._kept.append(text[:room])
        self.num_chars += len(text)
        return len(text)

    def text(self) -> str:
        """What was kept."""
        return "".join(self._kept)


class Step:
    """One step of code in the namespace that the steps before it left."""

    def __init__(self, peer: Peer, job: Mapping[str, Any]) -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self._namespace = vars(module)
        self._answer: str | None = None
        self._output = Output(job["max_output_chars"])
        self._max_variables_bytes: int = job["max_variables_bytes"]
        self._stubs: dict[str, Any] = {
            tool["function"]: Tool(peer, tool["function"], tool["tool"], tool["parameters"]) for tool in job["tools"]
        }
        self._stubs["final_answer"] = self._end
        # Beside print and len: they are no variables, and functions of the code do not hold them.
        vars(builtins).update(self._stubs, ToolError=ToolError)
        self._names = {id(stub): name for name, stub in self._stubs.items()}

    def run(self, code: str, variables: bytes) -> tuple[dict[str, Any], bytes]:
        """Run the code; what goes back to the server."""
        sys.stdout = sys.stderr = self._output
        lost = self._load(variables)
        failure, fault = "", ""
        try:
            body, last = _compiled(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            failure, fault = "parse", _describe(error)
        else:
            try:
                exec(body, self._namespace)
                if last is not None and (value := eval(last, self._namespace)) is not None:
                    self._output.write(f"{value!r}\n")
            except _FinalAnswer:
                pass
            except BaseException as error:
                failure, fault = "execution", _describe(error) + _place(error, code)
        kept, lost_now = self._dump()
        reply = {
            "output": self._output.text(),
            "num_chars": self._output.num_chars,
            "failure": failure,
            "fault": fault[:MAX_FAULT_CHARS],
            "answer": self._answer,
            "lost": {**lost, **lost_now},
        }
        return reply, kept

    def _end(self, value: Any) -> NoReturn:
        """End the task with this answer: text as it is, anything else as str() gives it."""
        text = value if isinstance(value, str) else str(value)
        self._answer = text if self._answer is None else self._answer
        raise _FinalAnswer

    def _load(self, variables: bytes) -> dict[str, str]:
        """Take up the variables; the reason where that fails."""
        if not variables:
            return {}
        import pickle

        namespace, stubs = self._namespace, self._stubs

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, name: str) -> Any:
                return namespace if name == "globals" else stubs[name]

        try:
            namespace.update(Unpickler(io.BytesIO(variables)).load())
        except BaseException as error:
            return {"all variables": _describe(error)}
        return {}

    def _dump(self) -> tuple[bytes, dict[str, str]]:
        """The variables as the next step takes them up, and those that cannot be kept with the reason."""
        found = {name: value for name, value in self._namespace.items() if not name.startswith("__")}
        if not found:
            return b"", {}
        try:
            return self._pickled(found), {}
        except BaseException:
            lost = {name: why for name in found if (why := self._why_not({name: found[name]}))}
        kept = {name: value for name, value in found.items() if name not in lost}
        try:
            return self._pickled(kept), lost
        except BaseException as error:
            return b"", {**lost, **dict.fromkeys(kept, _describe(error))}

    def _why_not(self, variable: dict[str, Any]) -> str:
        try:
            self._pickled(variable)
        except BaseException as error:
            return _describe(error)
        return ""

    def _pickled(self, variables: dict[str, Any]) -> bytes:
        import cloudpickle

        namespace, names = self._namespace, self._names

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            def __init__(self, file: io.BytesIO) -> None:
                super().__init__(file, protocol=5)
                # The globals of every function of the code: on loading they are the namespace itself, so that a
                # function sees what later steps assign, as it does within one step.
                self._globals: dict[str, Any] = {}
                self.globals_ref[id(namespace)] = self._globals

            def persistent_id(self, value: Any) -> str | None:
                return "globals" if value is self._globals else names.get(id(value))

        file = _Bounded(self._max_variables_bytes)
        Pickler(file).dump(variables)
        return file.getvalue()


class _Bounded(io.BytesIO):
    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._max_bytes:
            raise _TooLargeError(f"variables are kept up to {self._max_bytes} bytes: write it to a file")
        return super().write(data)


def main() -> None:
    """Run the step that comes over the socket whose descriptor is the first argument; the rest is the module path."""
    _die_with_parent()
    peer = Peer(int(sys.argv[1]))
    os.set_inheritable(int(sys.argv[1]), False)
    sys.path += sys.argv[2:]
    job, variables = peer.receive()
    for name, limit in job["limits"].items():
        _limit(getattr(resource, name), limit)
    peer.send(*Step(peer, job).run(job["code"], variables))
    os._exit(0)  # neither threads nor what the code registered for the end are waited for


def _compiled(code: str) -> tuple[types.CodeType, types.CodeType | None]:
    """The code, and its last expression apart where it ends in one."""
    # What ast.parse does, without the module ast, which costs a third of the start.
    tree: Any = compile(code, CODE_NAME, "exec", PyCF_ONLY_AST, dont_inherit=True)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], Expr) else None
    body = compile(tree, CODE_NAME, "exec", dont_inherit=True)
    if last is None:
        return body, None
    return body, compile(Expression(last.value), CODE_NAME, "eval", dont_inherit=True)


def _describe(error: BaseException) -> str:
    """An exception's type and message; neither may raise, whatever the code made of them."""
    try:
        name, text = type(error).__name__, str(error)
    except BaseException:
        return "an exception that cannot be described"
    return (f"{name}: {text}" if text else name)[:MAX_FAULT_CHARS]


def _place(error: BaseException, code: str) -> str:
    """Where in the code it happened."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == CODE_NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = code.splitlines()
    return f" (line {line}: {lines[line - 1].strip()[:200]})" if 1 <= line <= len(lines) else ""


def _as_json(value: Any) -> Any:
    """Numbers and arrays of numpy and its kin, sets, paths."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} cannot be given to a tool: give text, numbers, lists or dicts")


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    # One more second of CPU: at the soft limit the process is told, at the hard one it is killed.
    resource.setrlimit(kind, (most, most + 1 if kind == resource.RLIMIT_CPU and hard != most else most))


def _die_with_parent() -> None:
    """Without bubblewrap around it the process ends with the server by this alone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL


if __name__ == "__main__":
    main()
