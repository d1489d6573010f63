"""An application that leaves a mark on everything that a call can reach, and one that tells every mark it finds."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from nightschool_server.app import App, ToolContext, tool

NAMES = frozenset({"a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"})

seen: list[str] = []
"""A variable of the application's."""


@tool(effect="workspace")
def mark(name: str, context: ToolContext, *, crash: bool = False) -> str:
    """Leave a mark on state, files, variables and process; then end in the middle, or not."""
    context.state.setdefault("marks", []).append(name)
    with Path("log.txt").open("a") as log:
        log.write(f"{name};")
    Path(name).mkdir()
    Path(name, "secret").write_text(name)
    Path(name, "secret").chmod(0o400)
    Path("latest").unlink(missing_ok=True)
    Path("latest").symlink_to(Path(name).absolute())
    if name not in NAMES:
        raise ValueError(f"{name!r} is none of {sorted(NAMES)}")
    if crash:
        os._exit(1)
    seen.append(name)
    sys.path.append(name)
    sys.modules[name] = sys
    os.environ["MARK"] = name
    os.umask(0o077)
    os.nice(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.dup2(os.open("log.txt", os.O_RDWR), 77)
    sleep = "import time; time.sleep(600)"
    told = [sys.executable, "-c", sleep, str(context.workspace)]
    subprocess.Popen(told, start_new_session=True, stderr=subprocess.DEVNULL)
    os.chdir(name)
    return f"marked {name}"


@tool(effect="read_only")
def look(context: ToolContext) -> dict[str, Any]:
    """Everything that another call could have left behind."""
    found = sorted(context.workspace.rglob("*"))
    umask = os.umask(0)
    return {
        "state": context.state,
        "files": {str(path.relative_to(context.workspace)): _content(path, context.workspace) for path in found},
        "in the workspace": Path.cwd() == context.workspace,
        "seen": seen,
        "environment": os.environ.get("MARK", ""),
        "umask": umask,
        "niceness": os.nice(0),
        "files allowed": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "signal": signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL,
        "descriptor 77": os.path.exists("/proc/self/fd/77"),
        "imported": sorted({*sys.path, *sys.modules} & NAMES),
    }


def _content(path: Path, workspace: Path) -> str:
    if path.is_symlink():
        return f"-> {os.path.relpath(path.resolve(), workspace)}"
    return oct(stat.S_IMODE(path.stat().st_mode)) + (f" {path.read_text()}" if path.is_file() else "")


app = App("isolation", "Help.", [mark, look], max_steps=4)
