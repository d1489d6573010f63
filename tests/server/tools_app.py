"""An application whose tools misbehave in every way that the runtime must hold."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from nightschool_server.app import App, ToolContext, tool

seen: list[str] = []
"""A global that a call must never find changed by another."""


@tool(effect="read_only")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool(effect="read_only")
async def add_later(a: int, b: int) -> int:
    """Add two numbers, in a coroutine."""
    return a + b


@tool(effect="workspace")
def put(item: str, context: ToolContext) -> list[str]:
    """Put an item in the basket and into a file; gives the basket."""
    context.state.setdefault("basket", []).append(item)
    Path(item).write_text(item)
    return list(context.state["basket"])


@tool(effect="workspace")
def look(context: ToolContext) -> dict[str, object]:
    """All that another call could have left behind; leaves some itself."""
    found = {
        "state": dict(context.state),
        "files": sorted(os.listdir()),
        "seen": list(seen),
        "environ": os.environ.get("LEFT_BEHIND", ""),
        "home": Path.cwd() == context.workspace,
        "path": "/left/behind" in sys.path,
    }
    seen.append("look")
    os.environ["LEFT_BEHIND"] = "look"
    sys.path.append("/left/behind")
    os.chdir("/")
    return found


@tool(effect="workspace")
def fail_after_writing(context: ToolContext) -> str:
    """Change the state, then fail."""
    context.state["broken"] = True
    raise ValueError("no such thing")


@tool(effect="read_only")
def fail_by_mistake() -> str:
    """Fail as a program with a bug does."""
    return {}["key"]  # type: ignore[no-any-return]


@tool(effect="read_only")
def change_although_read_only(context: ToolContext) -> str:
    """Break its own declaration."""
    context.state["changed"] = True
    return "changed"


@tool(effect="workspace")
def keep_a_set(context: ToolContext) -> str:
    """Keep what is not JSON."""
    context.state["set"] = {1}
    return "kept"


@tool(effect="workspace")
def remove_workspace(context: ToolContext) -> str:
    """Remove the folder of the call, and put a link in its place."""
    for path in context.workspace.iterdir():
        path.unlink()
    context.workspace.rmdir()
    context.workspace.symlink_to("/tmp")
    return "removed"


@tool(effect="read_only")
def crash(how: str) -> str:
    """End the process in some way."""
    match how:
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit("bye")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            return "x" * (2**62)
        case "worker":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        case "close":
            os.closerange(3, 64)
    return "survived"


@tool(effect="read_only")
def hang(fifo: str) -> str:
    """Start a process that leaves the session, tell both ids through a FIFO, and hang."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(fifo).write_text(f"{os.getpid()} {started.pid}")
    time.sleep(600)
    return "never"


@tool(effect="read_only")
def leave_running() -> int:
    """Start a process, leave it, and give its id."""
    return subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, stderr=subprocess.DEVNULL
    ).pid


@tool(effect="read_only")
def leave_daemon() -> int:
    """Start a process that is nobody's child, and give its id."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if (daemon := os.fork()) == 0:
            time.sleep(600)
        os.write(theirs, str(daemon).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(ours, 20))


@tool(effect="read_only")
def leave_ticking(path: str, how: Literal["thread", "timer"]) -> str:
    """Leave what writes to a file again and again."""

    def tick(*_: object) -> None:
        with open(path, "a") as file:
            file.write(".")

    def keep_ticking() -> None:
        while True:
            tick()

    if how == "thread":
        threading.Thread(target=keep_ticking, daemon=True).start()
    else:
        signal.signal(signal.SIGALRM, tick)
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    while not os.path.exists(path):
        time.sleep(1e-4)
    return "ticking"


KEPT: list[object] = []


@tool(effect="read_only")
def keep_locked(path: str) -> str:
    """Lock a file at once or not at all, and never let go of it."""
    file = open(path, "w")  # noqa: SIM115
    KEPT.append(file)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return "locked"


@tool(effect="read_only")
def meet(fifo: str, *, speak: bool) -> str:
    """Wait for another call of this tool: one speaks through a FIFO, the other listens."""
    if speak:
        Path(fifo).write_text("hello")
        return "spoke"
    return Path(fifo).read_text()


@tool(effect="read_only")
def grow(mebibytes: int) -> int:
    """Take so much memory."""
    return len(bytearray(mebibytes * 2**20))


@tool(effect="read_only")
def litter() -> str:
    """Write a file although it says that it changes nothing."""
    Path("litter").write_text("litter")
    return "done"


@tool(effect="read_only")
def shout(length: int) -> str:
    """A long text; prints on stdout too."""
    print("this must not reach anyone")  # noqa: T201
    os.write(1, b"nor this")
    return "x" * length


@tool(effect="read_only")
def half_a_character() -> str:
    """Text that UTF-8 does not take."""
    return "a\ud800b"


def posted(text: str, context: ToolContext) -> str:
    """Keeps the card in the task's own state and files; the text `@FIFO` makes it hang, and tell its id there."""
    if text.startswith("@"):
        Path(text[1:]).write_text(str(os.getpid()))
        time.sleep(600)
    context.state.setdefault("cards", []).append(text)
    Path("card.txt").write_text(text)
    return f"posted {len(context.state['cards'])}"


@tool(simulate=posted)
def post(text: str) -> str:
    """Post a card: the world outside changes."""
    return f"really posted {text}"


@tool
def send_mail(to: str) -> str:
    """Send a mail: the world outside changes."""
    return f"sent to {to}"


app = App(
    "tools",
    "Use the tools.",
    [
        add, add_later, put, look, fail_after_writing, fail_by_mistake, change_although_read_only, keep_a_set, crash,
        remove_workspace,
        hang, keep_locked, leave_running, leave_daemon, leave_ticking, meet, grow, litter, shout, half_a_character,
        post, send_mail,
    ],
    initial_state={"basket": []},
    tool_timeout_s=30,
)  # fmt: skip
