"""Whether there is a sandbox here, proven by a step that runs in it, before anything relies on it."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from nightschool_server.config.code import CodeConfig
from nightschool_server.errors import FailedPreconditionError
from nightschool_server.sandbox import bubblewrap
from nightschool_server.sandbox.sandbox import CodeStep, Reply, Sandbox

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_sandbox(config: CodeConfig, *, unsafe: bool = False) -> AsyncIterator[Sandbox]:
    """A sandbox that has proven to work. Raises FailedPreconditionError with the remedy where it does not."""
    sandbox = Sandbox(config, unsafe=unsafe)
    if unsafe:
        logger.warning("event=unsafe_code text=%r", UNSAFE)
    await prove(sandbox)
    yield sandbox


UNSAFE = (
    "agent.unsafe_code is set: code that the model writes runs without a sandbox, with every right of this user, "
    "the network and all files among them"
)


def version() -> str:
    """bubblewrap's name and version."""
    told = subprocess.run([bubblewrap.bwrap_path(), "--version"], capture_output=True, text=True, check=False)
    return told.stdout.strip()


async def prove(sandbox: Sandbox) -> None:
    """Run a step that must answer. Raises FailedPreconditionError with the remedy where it does not."""
    remedy = "install bubblewrap 0.5 or newer and libseccomp2, or accept the risk with --unsafe-code"
    with tempfile.TemporaryDirectory(prefix="nightschool-proof-") as root:
        step = CodeStep("final_answer(6 * 7)", (), b"", Path(tempfile.mkdtemp(dir=root)), 1000)
        try:
            result = await sandbox.run(step, _no_tool, sandbox.config.timeout_s)
        except (FailedPreconditionError, OSError) as error:
            raise FailedPreconditionError(f"code actions need a sandbox: {error}: {remedy}") from error
    if result.answer != "42":
        why = result.fault or "it does not answer"
        raise FailedPreconditionError(f"code actions need a sandbox, which does not work here ({why}): {remedy}")


async def _no_tool(name: str, arguments: Any) -> Reply | None:
    return None
