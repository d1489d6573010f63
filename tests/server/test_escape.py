"""Hostile code against the sandbox: every attempt is held, the server is unharmed and nothing of it is left.

The world around has what is worth stealing or harming: a home with a token, a secret in the server's environment,
sockets that listen, a process. The limits are small, so that the attempts which run into them take little time; those
in time hold for these attempts alone, because on a busy machine the others need more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nightschool_server.agent.code import observation
from nightschool_server.config.code import MIB, CodeConfig
from nightschool_server.sandbox.folder import Size, measure
from nightschool_server.sandbox.sandbox import CodeResult, CodeStep, Function, Reply, Sandbox
from nightschool_server.tools.state import ToolState

from tests.server.escapes import ESCAPES, PREAMBLE, SYSTEM_CALLS, Escape
from tests.server.leaks import no_leaks
from tests.server.sandboxes import needs_sandbox

SECRET = "the-token-of-the-server"
LIMITS = CodeConfig(timeout_s=60, cpu_s=10, memory_bytes=256 * MIB, disk_bytes=8 * MIB, max_files=200)
BRIEF = LIMITS.model_copy(update={"timeout_s": 4.0, "cpu_s": 1})
"""For what goes on until it is killed."""
MAX_CALLS = 50

pytestmark = needs_sandbox


@dataclass(frozen=True)
class World:
    """What is around the sandbox."""

    home: Path
    token: Path
    process: subprocess.Popen[bytes]
    listeners: tuple[socket.socket, ...]
    """TCP, UDP, in the file system, abstract."""

    def named(self, code: str) -> str:
        """The code with the world's names put in."""
        tcp, _, path, abstract = self.listeners
        names = {
            "TOKEN": self.token, "HOME": self.home, "SECRET": SECRET, "SOCKET": path.getsockname(),
            "ABSTRACT": abstract.getsockname()[1:].decode(), "PORT": tcp.getsockname()[1], "PID": self.process.pid,
        }  # fmt: skip
        for name, value in names.items():
            code = re.sub(rf"\b{name}\b|(?<=\\0){name}\b", str(value), code)
        return code

    def check(self) -> None:
        """Nothing of it has changed."""
        assert self.process.poll() is None
        assert self.token.read_text() == SECRET
        assert sorted(os.listdir(self.home)) == ["token"]
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()


def tcp_and_udp() -> tuple[socket.socket, socket.socket]:
    """Two sockets of one number, which must be free for both."""
    while True:
        tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
        else:
            return tcp, udp


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    home = folder / "home"
    home.mkdir(mode=0o755)
    token = home / "token"
    token.write_text(SECRET)
    os.environ["NIGHTSCHOOL_TEST_SECRET"] = SECRET
    port, udp = tcp_and_udp()
    path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    path.bind(str(folder / "socket"))
    abstract.bind(f"\0nightschool-{os.getpid()}")
    listeners = (port, udp, path, abstract)
    for listener in listeners:
        listener.setblocking(False)
    path.listen()
    abstract.listen()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    yield World(home, token, process, listeners)
    process.kill()
    process.wait()
    for listener in listeners:
        listener.close()
    del os.environ["NIGHTSCHOOL_TEST_SECRET"]


class Attempts:
    """Runs attempts on a workspace, with one tool to call."""

    def __init__(self, root: Path, *, unsafe: bool = False) -> None:
        self._unsafe = unsafe
        self.state = ToolState("{}", root)
        root.mkdir()
        self.workspace = self.state.make_workspace()
        self._num_calls = 0

    async def run(self, code: str, variables: bytes = b"", limits: CodeConfig = LIMITS) -> CodeResult:
        """Run `code`; what became of it."""
        step = CodeStep(code, [Function("offered", "offered", ())], variables, self.workspace, 300)
        return await Sandbox(limits, unsafe=self._unsafe).run(step, self._answer, limits.timeout_s)

    async def _answer(self, name: str, arguments: Any) -> Reply | None:
        self._num_calls += 1
        if self._num_calls > MAX_CALLS:
            return None
        if not isinstance(arguments, dict):
            return Reply("error: arguments must be an object", True, False)
        return Reply("called" if name == "offered" else "error: no tool is called that", name != "offered", False)

    def check(self) -> None:
        """What is left is a workspace of a size and shape that the server can go on with."""
        assert os.listdir(self.state.root) == [self.workspace.name]
        assert measure(self.workspace, Size(10**6, 10**12)).fault(Size(LIMITS.max_files, LIMITS.disk_bytes)) is None
        for folder, folders, files in os.walk(self.workspace):
            for path in (Path(folder, name) for name in (*folders, *files)):
                mode = path.lstat().st_mode
                assert stat.S_ISREG(mode) or stat.S_ISDIR(mode)
                assert mode & (stat.S_ISUID | stat.S_ISGID) == 0
                assert mode & stat.S_IRUSR
        state = ToolState("{}", self.state.root, self.workspace)
        fork = state.fork()
        fork.discard()
        state.discard()
        assert not self.workspace.exists()


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name.replace(" ", "_"))
async def test_hostile_code_is_held(escape: Escape, world: World, tmp_path: Path) -> None:
    async with no_leaks(tmp_path):
        attempts = Attempts(tmp_path / "root")
        limits = BRIEF if escape.goes_on else LIMITS
        result = await attempts.run(PREAMBLE + world.named(escape.code), limits=limits)
        seen = observation(CodeResult(**{**vars(result), "lost": {}}), 1000)
        assert re.fullmatch(escape.held, seen, re.DOTALL), seen
        assert SECRET not in seen
        assert result.answer is None
        world.check()
        attempts.check()
        attempts.state.root.rmdir()


@pytest.mark.parametrize("name", ["reads the server's token", "connects by TCP", "runs a shell"])
async def test_the_same_code_succeeds_without_the_sandbox(name: str, world: World, tmp_path: Path) -> None:
    (escape,) = [one for one in ESCAPES if one.name == name]
    result = await Attempts(tmp_path / "root", unsafe=True).run(PREAMBLE + world.named(escape.code))
    assert result.output.startswith("ESCAPED")
    if name == "connects by TCP":
        world.listeners[0].accept()[0].close()


def number_of(name: str) -> int:
    """Of a system call on this machine; negative where there is none."""
    import pyseccomp

    return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))


async def test_system_calls_that_code_needs_not_do_not_exist(tmp_path: Path) -> None:
    numbers = {name: number for name in SYSTEM_CALLS if (number := number_of(name)) >= 0}
    assert len(numbers) > 80
    code = (
        f"{PREAMBLE}\nfor name, number in {numbers!r}.items():\n"
        "    got = libc.syscall(number, 0, 0, 0, 0, 0, 0)\n"
        "    if got != -1 or ctypes.get_errno() not in (1, 38): print('ESCAPED', name, got, ctypes.get_errno())\n"
        # A new user, mount, network or process namespace by the call that also makes threads.
        "for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x4000000, 0x8000000, 0x2000000, 0):\n"
        f"    if libc.syscall({number_of('clone')}, flag | 17, 0, 0, 0, 0) != -1: print('ESCAPED clone', flag)\n"
        "print('done')"
    )
    assert (await Attempts(tmp_path / "root").run(code)).output == "done\n"


@pytest.mark.parametrize(
    ("reduce", "seen"),
    [
        ("(exec, ('import os; os._exit(0)',))", r"error: the code's process ended with exit code 0"),
        (
            "(exec, ('while True: pass',))",
            r"error: the code (took too long|used more than 1 s of CPU time) and was killed",
        ),
        ("(open, ('TOKEN',))", r"fresh\nnot kept: all variables \(FileNotFoundError: .*"),
        ("(exec, ('import builtins; builtins.final_answer = print',))", r"final answer: fresh|fresh"),
    ],
)
async def test_a_bomb_among_the_variables_goes_off_inside(reduce: str, seen: str, world: World, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "root")
    armed = await attempts.run(world.named(f"class Bomb:\n    def __reduce__(self): return {reduce}\nbomb = Bomb()"))
    assert armed.variables, "the server keeps them as they are"
    result = await attempts.run("print('fresh')", armed.variables, BRIEF if "CPU time" in seen else LIMITS)
    assert re.fullmatch(seen, observation(result, 1000), re.DOTALL), observation(result, 1000)
    world.check()


async def test_a_variable_that_raises_while_it_is_kept_is_left_out(tmp_path: Path) -> None:
    code = "class Bomb:\n    def __reduce__(self): raise KeyboardInterrupt('no')\nbomb = Bomb()\nkept = 1"
    attempts = Attempts(tmp_path / "root")
    result = await attempts.run(code)
    assert dict(result.lost) == {"bomb": "KeyboardInterrupt: no"}
    assert (await attempts.run("print(kept)", result.variables)).output == "1\n"


async def test_hostile_steps_at_once_do_not_hold_up_the_server(world: World, tmp_path: Path) -> None:
    """While all places are taken by steps that burn and flood, the event loop goes round, and others follow."""
    attempts = [Attempts(tmp_path / str(number)) for number in range(4)]
    rounds = 0

    async def go_round() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    going = asyncio.create_task(go_round())
    codes = ["while True: pass", "x = []\nwhile True: x.append(bytearray(2 ** 20))", "while True: print('x' * 10 ** 6)",
             "while True:\n    try: offered()\n    except ToolError: pass"]  # fmt: skip
    results = await asyncio.gather(*(one.run(code, limits=BRIEF) for one, code in zip(attempts, codes, strict=True)))
    going.cancel()
    assert [bool(result.failure) for result in results] == [True] * 4
    assert rounds > 100
    assert (await attempts[0].run("final_answer(1)")).answer == "1"
    world.check()
    assert json.dumps([result.output for result in results]).isascii()
