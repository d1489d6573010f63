"""The view of the world that code gets: bubblewrap's command line, and the Python that is in it.

Owns what is visible: the system's libraries, the interpreter that runs the server and its installed packages, all
read-only, one device, and two writable folders, the task's workspace and a temporary one. There is no /proc, no
/sys, no /etc but what the dynamic linker reads, no network and no home.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from nightschool_server.errors import FailedPreconditionError

WORKSPACE = "/workspace"
PROGRAM = "/nightschool/program.py"
USER_ID = "1000"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": WORKSPACE,
    # One thread each: every thread of theirs reserves address space, which is limited.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_LINKER = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")


@dataclass(frozen=True)
class Descriptors:
    """What is handed to bubblewrap beside its arguments."""

    socket: int
    """The sandbox's end."""
    info: int
    """Where bubblewrap says which process it made."""
    filter: int
    """Where it reads the seccomp program."""


def command(workspace: Path, temporary: Path, descriptors: Descriptors) -> list[str]:
    """How to start the program in a sandbox.

    Raises FailedPreconditionError where bubblewrap is missing, and where the workspace, and with it the home that it is
    in, lies where code can read.
    """
    for path in visible():
        if workspace.is_relative_to(path):
            raise FailedPreconditionError(f"{workspace} lies in {path}, which code can read: keep the home elsewhere")
    arguments = [
        *(bwrap_path(), "--unshare-all", "--die-with-parent", "--new-session"),
        *("--uid", USER_ID, "--gid", USER_ID, "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
    ]
    for name, value in {**ENVIRONMENT, "TMPDIR": "/tmp"}.items():
        arguments += ["--setenv", name, value]
    # First, so that it does not hide packages that are installed below /tmp.
    arguments += ["--bind", str(temporary), "/tmp"]
    arguments += [*_read_only_view(), "--bind", str(workspace), WORKSPACE]
    arguments += ["--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", WORKSPACE]
    arguments += ["--info-fd", str(descriptors.info), "--seccomp", str(descriptors.filter)]
    return [*arguments, "--", *python(PROGRAM, descriptors.socket)]


def python(program: str, socket: int) -> list[str]:
    """The bare interpreter on `program`: no environment, no site, no bytecode written."""
    return [str(interpreter()), "-I", "-S", "-B", program, str(socket), *map(str, packages())]


def bwrap_path() -> str:
    """Where bubblewrap is. Raises FailedPreconditionError."""
    if sys.platform != "linux":
        raise FailedPreconditionError(f"bubblewrap needs Linux, this is {sys.platform}")
    if (path := shutil.which("bwrap")) is None:
        raise FailedPreconditionError("bwrap is not on the PATH")
    return path


def interpreter() -> Path:
    """The interpreter behind the server's virtual environment."""
    return Path(os.path.realpath(sys.executable))


def packages() -> list[Path]:
    """The folders of installed packages, which code may import from: the interpreter's, and where ours are."""
    found = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = find_spec("cloudpickle")
    if spec is not None and spec.origin is not None:
        found.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in found if os.path.isdir(path)))


@cache
def visible() -> tuple[Path, ...]:
    """Whole folders of this machine that code can read."""
    prefix = Path(os.path.realpath(sys.base_prefix))
    return tuple(dict.fromkeys((*(Path(name) for name in _SYSTEM if os.path.isdir(name)), prefix, *packages())))


@cache
def _read_only_view() -> tuple[str, ...]:
    arguments: list[str] = []
    for path in (Path(name) for name in _SYSTEM):
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in _LINKER:
        arguments += ["--ro-bind-try", name, name]
    shown = [Path(name) for name in _SYSTEM]
    for path in visible():
        if not any(path.is_relative_to(other) for other in shown):
            arguments += ["--ro-bind", str(path), str(path)]
            shown.append(path)
    program = Path(__file__).with_name("program.py")
    return (*arguments, "--ro-bind", str(program), PROGRAM)
