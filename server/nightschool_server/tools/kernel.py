"""What a tool worker asks of the operating system: who runs below it, what it holds, what becomes of it.

Linux for the most part; elsewhere each function says that it cannot tell, or does nothing. `mcp/guardian.py` asks some
of the same in its own words: it runs as a script without this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import sys
import termios
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_WALL = 0x40000000
"""Of linux/wait.h: also children that tell nobody of their end."""
_MAX_DESCRIPTOR = 2**16
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Have this process killed when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Have what is below this process stay below it when its own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def leave_terminal() -> None:
    """Have no terminal: a tool that asks at one for a password fails at once instead of stopping for ever."""
    with contextlib.suppress(OSError), open("/dev/tty", "rb", buffering=0) as terminal:
        fcntl.ioctl(terminal, termios.TIOCNOTTY)


def is_alone() -> bool:
    """Whether this process has one thread and none below it. False also where that cannot be told: outside Linux.

    It is asked in the tool's own interpreter, so it holds against what a tool forgets, not against one that lies.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError):
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
        except ChildProcessError:
            # Linux counts the threads in the links of the folder; listing them takes ten times as long.
            return os.stat("/proc/self/task").st_nlink == 2 + 1
    return False


def close_all_but(kept: int) -> None:
    """Let go of what the call has locked, bound or begun: the next one may run before this process ends."""
    os.closerange(3, kept)
    os.closerange(kept + 1, _MAX_DESCRIPTOR)


def children() -> list[int]:
    """Processes whose parent this one is; Linux only, elsewhere none are found."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        return []


def data_bytes() -> int:
    """Private writable memory of this process, which is what RLIMIT_DATA counts; Linux only, elsewhere 0.

    RLIMIT_AS would count what libraries merely reserve, a hundred times of what they use.
    """
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[5]) * resource.getpagesize() if path.exists() else 0


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc.prctl(option, value, 0, 0, 0)
