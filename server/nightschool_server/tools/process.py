"""The tool worker's own process: it holds the application and forks a child for every call.

    server --frames--> worker (`main`) --fork--> child (`tool_call.perform`): one call, then gone

The child is forked ahead of its call and runs in a group of processes of its own, so that globals, environment and
working directory of one call never meet another's, and a crash or a kill costs only that call. After
every call the worker kills whatever the call left running, before it passes the reply on; where the child can show
that nothing was left but itself, which has nothing more to do, the reply goes first. The worker ends when the server's
end of the socket closes. `workers.py` is that end. Stays light: no torch, no jsonschema, because its imports
are every worker's start and every fork's memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nightschool_server.app import App, import_app
from nightschool_server.errors import AppError
from nightschool_server.tools.call import perform, warm_up
from nightschool_server.tools.kernel import (
    adopt_orphans,
    children,
    close_all_but,
    data_bytes,
    end_with_parent,
    is_alone,
    leave_terminal,
)

MAX_FRAME_BYTES = 16 * 2**20
"""A longer frame means a broken or hostile peer."""

_RECEIVE_BYTES = 2**18
_SIGNALS = tuple(signal.valid_signals())
_ALONE, _NOT_ALONE = b"\1", b"\0"
"""Before the frame of a child's reply: see `is_alone`."""


def frame(value: Any) -> bytes:
    """A value as it goes over a socket: 4 bytes of length, then JSON."""
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


KILL = frame({"kill": True})
"""From the server, in place of a call: end the one that runs."""


def main() -> int:
    """Serve calls on the socket that the first argument names, until the other end closes."""
    server = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(server.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ctrl-C in a terminal is for the server, which ends its workers in order. No session of its own: that would be a
    # share of the processor of its own, and the learner's workers are niced. (uvloop starts no group.)
    os.setpgid(0, 0)
    leave_terminal()
    init = _receive(server)
    if init is None:
        return 0
    # What tools print is dropped; their stderr is the server's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:] = init["path"]
    try:
        app = import_app(init["app"])
    except AppError as error:
        server.sendall(frame({"error": str(error)}))
        return 1
    server.sendall(frame({"ready": os.getpid()}))
    Worker(app, server, init["max_memory_bytes"]).serve()
    return 0


class Child:
    """A forked process that waits for one call, and the worker's end of its socket."""

    def __init__(self, app: App, close: tuple[socket.socket, ...], max_data_bytes: int = 0) -> None:
        worker = os.getpid()
        self.socket, theirs = socket.socketpair()
        self._received = bytearray()
        self._status: int | None = None
        self.left_nothing = False
        """Nothing of the call runs any more, and nothing of it can begin to: known with the reply."""
        self.is_open = True
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for inherited in (self.socket, *close):
                    inherited.close()
                _become_child(worker, max_data_bytes)
                _answer(warm_up)
                if (call := _receive(theirs)) is not None:
                    reply = _answer(partial(perform, app, call), _SIGNALS)
                    close_all_but(theirs.fileno())
                    theirs.sendall(reply)
                    if reply.startswith(_ALONE):
                        # Its end is the kernel's work for a millisecond, on the core that the reader is woken on: it
                        # waits for the kill, behind the reply.
                        theirs.recv(1)
            finally:
                os._exit(0)
        theirs.close()

    def send(self, call: bytes) -> None:
        """Hand over the call's frame. The child reads it before any code of a tool runs."""
        with contextlib.suppress(ConnectionError):  # Then it is dead, and `ended` says so.
            self.socket.sendall(call)
        self.socket.setblocking(False)

    def reply(self) -> bytes | None:
        """The reply's frame where it is complete."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self.is_open and len(self._received) <= MAX_FRAME_BYTES:
                chunk = self.socket.recv(_RECEIVE_BYTES)
                self._received += chunk
                self.is_open = bool(chunk)
        size = 4 + int.from_bytes(self._received[1:5], "big")
        if size > MAX_FRAME_BYTES:
            return _failure("the tool's output is too large")
        if len(self._received) <= max(size, 5):
            return None
        self.left_nothing = self._received[:1] == _ALONE
        return bytes(self._received[1 : 1 + size])

    def ended(self) -> str | None:
        """How the child ended, if it has."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        if self._status is None:
            return None
        code = os.waitstatus_to_exitcode(self._status)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def destroy(self) -> None:
        """Kill it with all that it started, and reap them."""
        self.socket.close()
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._status is None or kill is os.killpg:
                    kill(self.pid, signal.SIGKILL)
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        # Those that left its group are our children now, because we are their subreaper.
        while orphans := children():
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


class Worker:
    """Forks a child per call, passes its call and reply on, and cleans up behind it."""

    def __init__(self, app: App, server: socket.socket, max_memory_bytes: int = 0) -> None:
        self._app = app
        self._server = server
        self._child_ended, self._wakeup = socket.socketpair()
        for end in (self._child_ended, self._wakeup):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._selector = selectors.DefaultSelector()
        for source in (server, self._child_ended):
            self._selector.register(source, selectors.EVENT_READ)
        adopt_orphans()
        # Freezing keeps the collector of every child from touching, and so copying, shared pages.
        gc.collect()
        gc.freeze()
        self._max_data_bytes = data_bytes() + max_memory_bytes if max_memory_bytes else 0

    def serve(self) -> None:
        """One call after another, until the server closes."""
        reply: bytes | None = b""
        while reply is not None:
            child = Child(self._app, (self._server, self._child_ended, self._wakeup), self._max_data_bytes)
            try:
                call = self._next_call()
                reply = None if call is None else self._run(child, call)
                # A process that has slipped out from below the child is ours now.
                goes_first = child.left_nothing and children() == [child.pid]
                if reply is not None and goes_first:
                    self._server.sendall(reply)
            finally:
                child.destroy()
            if reply is not None and not goes_first:
                self._server.sendall(reply)

    def _next_call(self) -> bytes | None:
        # A kill that comes now is for a call whose reply was on its way already.
        while (message := _receive_frame(self._server)) == KILL:
            pass
        return message

    def _run(self, child: Child, call: bytes) -> bytes | None:
        """The reply to `call`; None where the server is gone. Both as frames, which only the child reads."""
        child.send(call)
        self._selector.register(child.socket, selectors.EVENT_READ)
        watched = True
        try:
            while True:
                ready = {key.fileobj for key, _ in self._selector.select()}
                if self._server in ready:
                    return None if _receive_frame(self._server) is None else frame({"failure": "killed"})
                if self._child_ended in ready:
                    self._child_ended.recv(_RECEIVE_BYTES)
                # Asked before the socket is read: an ended child has written all that it ever will.
                ended = child.ended()
                if (reply := child.reply()) is not None:
                    return reply
                if ended is not None:
                    return _failure(f"the tool's process ended with {ended}")
                if watched and not child.is_open:  # A tool closed it and runs on; only its end is awaited.
                    self._selector.unregister(child.socket)
                    watched = False
        finally:
            if watched:
                self._selector.unregister(child.socket)


def _become_child(worker: int, max_data_bytes: int) -> None:
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
    adopt_orphans()  # Whatever the call starts stays below it, for `is_alone` to see.
    if max_data_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (max_data_bytes, max_data_bytes))
    if os.getppid() != worker:
        os._exit(0)


def _answer(run: Callable[[], dict[str, Any]], block: Iterable[int] = ()) -> bytes:
    """What a call gives, as it goes to the worker. With the signals blocked, no handler of a tool runs behind it."""
    reply = frame(run())
    signal.pthread_sigmask(signal.SIG_BLOCK, block)
    return (_ALONE if is_alone() else _NOT_ALONE) + reply


def _failure(content: str) -> bytes:
    return frame({"failure": "execution", "content": f"error: {content}"})


def _receive_frame(peer: socket.socket) -> bytes | None:
    """One frame from a blocking socket; None where the peer has closed."""
    try:
        header = peer.recv(4, socket.MSG_WAITALL)
        body = peer.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL) if len(header) == 4 else b""
    except ConnectionError:
        return None
    return header + body if body else None


def _receive(peer: socket.socket) -> Any:
    """The value of one frame from a blocking socket; None where the peer has closed."""
    received = _receive_frame(peer)
    return None if received is None else json.loads(received[4:])


if __name__ == "__main__":
    sys.exit(main())
