"""The process between us and an MCP server's: when we are gone, however that came, nothing of the server stays.

    we --stdin, stdout, stderr--> the MCP server
       --lifeline---------------> guardian, whose child the server is

Run as a script of its own (`python -I -S guardian.py DESCRIPTOR COMMAND...`), standard library alone, so that it starts
in milliseconds. Reports over the lifeline, a socket, how the server ended. When the lifeline closes it ends the server
and all that the server started, also what left its group of processes (Linux; elsewhere that escapes).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import selectors
import signal
import socket
import subprocess
import sys
import termios
import time

TERM_S = 1.0
"""Between a polite signal and a kill, seconds."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


def main() -> int:
    """Run the command and guard it."""
    lifeline = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(lifeline.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)  # Ctrl-C in a terminal is for us, who end the servers in order.
    _leave_terminal()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ended, wakeup = socket.socketpair()
    for end in (ended, wakeup):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        # This process has one thread, so code may run between fork and exec.
        server = subprocess.Popen(sys.argv[2:], process_group=0, preexec_fn=_die_with_parent)  # noqa: PLW1509
    except OSError as error:
        lifeline.sendall(f"cannot be started: {error}".encode())
        return 1
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # Only the server holds the pipes, so that their ends are its ends.
        os.dup2(null, descriptor)
    _wait(server, lifeline, ended)
    _destroy(server)
    with contextlib.suppress(OSError):
        lifeline.sendall(_described(server.returncode).encode())
    return 0


def _wait(server: subprocess.Popen[bytes], lifeline: socket.socket, ended: socket.socket) -> None:
    """Until the server ends, or the lifeline does."""
    selector = selectors.DefaultSelector()
    for source in (lifeline, ended):
        selector.register(source, selectors.EVENT_READ)
    while server.poll() is None:
        ready = {key.fileobj for key, _ in selector.select()}
        if lifeline in ready:
            return
        if ended in ready:
            ended.recv(4096)


def _destroy(server: subprocess.Popen[bytes]) -> None:
    """End what is left of the server: politely, then surely."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(TERM_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    # Those that left its group are our children now, because we are their subreaper.
    deadline = time.monotonic() + TERM_S
    while (orphans := _children()) and time.monotonic() < deadline:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _described(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # A real-time signal has no name.
        return f"signal {-code}"


def _children() -> list[int]:
    """Processes whose parent this one is; Linux only, elsewhere none are found."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        return []


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_terminal() -> None:
    """Have no terminal: a server that asks at one for a password fails at once instead of stopping for ever."""
    with contextlib.suppress(OSError), open("/dev/tty", "rb", buffering=0) as terminal:
        fcntl.ioctl(terminal, termios.TIOCNOTTY)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc.prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
