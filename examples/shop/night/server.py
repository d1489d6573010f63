"""The server of the demo: a real `nightschool serve` process on a free port, with a home folder of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "shop" / "model"
APP = "examples.shop.app:app"
START_S = 120.0
STOP_S = 40.0


class ServerDiedError(RuntimeError):
    """The server ended by itself; the message holds the end of its log."""


@asynccontextmanager
async def serving(home: Path, settings: Sequence[str] = ()) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server on the folder `home` until the block ends; its log is `home/server.log`.

    Raises ServerDiedError where it does not come up within START_S.
    """
    command = [str(Path(sys.executable).with_name("nightschool")), "serve", "--home", str(home), "--model", str(MODEL)]
    command += ["--app", APP, "--port", "0", *(flag for setting in settings for flag in ("--set", setting))]
    log_path = home / "server.log"
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        await _until_ready(process, home / "server.json", log_path)
        yield process
    finally:
        await _stop(process)


async def _until_ready(process: asyncio.subprocess.Process, marker: Path, log_path: Path) -> None:
    ended = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(START_S):
            while not _exists(marker):
                done, _ = await asyncio.wait({ended}, timeout=0.1)
                if done:
                    raise ServerDiedError(_tail(log_path))
    except TimeoutError as error:
        raise ServerDiedError(f"not serving after {START_S:.0f} s\n{_tail(log_path)}") from error
    finally:
        ended.cancel()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _exists(path: Path) -> bool:
    return path.exists()


def _tail(log_path: Path, num_lines: int = 20) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-num_lines:])
