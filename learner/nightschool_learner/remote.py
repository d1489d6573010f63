"""`nightschool train`: the trainer of cycles that run on another host (learner.train.placement = 'remote').

Fetches the run that waits, trains it with the same trainer process as a learner does, sends the adapter, and waits for
the next. Killed, it goes on from the last checkpoint when it is started again on the same work folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import nightschool
from nightschool import AsyncClient

from nightschool_learner.bundle import unpack
from nightschool_learner.errors import LearnerError, StageFailedError
from nightschool_learner.manifest import RunFolder
from nightschool_learner.sampling import AWAY
from nightschool_learner.trainer_process import end_stale_trainer, last_words, start_trainer

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""How often the server is asked for a run."""
SHOW_S = 1.0
USER_MISTAKE = 2

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "provenance.json")

EXAMPLE = """example:
  NIGHTSCHOOL_TOKEN=... nightschool train --address serving.example:50051 --model /models/base
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what waits. Exit codes: 0 done, 1 a fault of the server or the trainer, 2 the user's mistake."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    options.model, options.work = options.model.expanduser().absolute(), options.work.expanduser().absolute()
    if not options.model.is_dir():
        return _fail(f"--model {options.model} is no folder: give the served base model", USER_MISTAKE)
    options.work.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        asyncio.run(_serve(options))
    except (LearnerError, nightschool.NightschoolError) as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


async def train_one(client: AsyncClient, model: Path, work: Path, cycle_id: str = "") -> str:
    """Fetch, train and send one run. Returns the adapter's name.

    Raises FailedPreconditionError where none waits, StageFailedError where training fails, and what the SDK raises.
    """
    cycle_id, archive = await _fetch(client, work, cycle_id)
    path = work / cycle_id
    folder = RunFolder(path)
    if not folder.manifest.exists():
        folder = await asyncio.to_thread(unpack, archive, path, str(model))
    await asyncio.to_thread(end_stale_trainer, folder)
    if folder.read_result() is None:
        await _train(folder)
    files = {name: (folder.adapter / name).read_bytes() for name in ADAPTER_FILES}
    manifest = folder.read_manifest()
    adapter = await client.admin.adapters.import_(
        files=files,
        parent=manifest.parent,
        reason=f"trained for cycle {cycle_id} on another host",
        request_id=f"import-{cycle_id}",
    )
    archive.unlink(missing_ok=True)
    return adapter.name


async def _serve(options: argparse.Namespace) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    async with AsyncClient(options.address, tls=options.tls) as client:
        while True:
            try:
                name = await train_one(client, options.model, options.work, options.cycle)
            except (nightschool.FailedPreconditionError, *AWAY) as error:
                if not options.watch:
                    raise
                logger.debug("event=no_run reason=%s", error)
                await asyncio.sleep(POLL_S)
                continue
            print(name, flush=True)  # noqa: T201
            if not options.watch:
                return


async def _fetch(client: AsyncClient, work: Path, cycle_id: str) -> tuple[str, Path]:
    """The id of the cycle and the archive of its run."""
    partial = work / f".run.{os.getpid()}"
    try:
        with partial.open("wb") as file:
            async with aclosing(client.admin.placement.export_run(cycle_id)) as chunks:
                async for piece in chunks:
                    cycle_id = piece.cycle_id
                    file.write(piece.chunk)
        archive = work / f"{cycle_id}.tar"
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("event=run_fetched cycle=%s size_bytes=%d", cycle_id, archive.stat().st_size)
    return cycle_id, archive


async def _train(folder: RunFolder) -> None:
    child = await start_trainer(folder)
    ended, shown = asyncio.create_task(child.wait()), ""
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=SHOW_S)
            with contextlib.suppress(ValueError):
                now = folder.read_progress()
                said = f"event=training phase={now.phase} step={now.step} of={now.num_steps}"
                if said != shown:
                    shown = said
                    logger.info("%s", said)
    finally:
        await child.stop()
        await ended
    if folder.read_result() is None:
        raise StageFailedError(f"the trainer ended without a result: {last_words(folder)} (log: {folder.log})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool train",
        description="Train the cycles of a server on another host, which has learner.train.placement = 'remote'. The "
        "adapter's name is written to stdout. The token is $NIGHTSCHOOL_TOKEN and needs the scope admin.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--address", help="host:port of the server (default: $NIGHTSCHOOL_ADDRESS, else this machine's)"
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="the served base model's folder on this host"
    )
    parser.add_argument("--cycle", default="", metavar="ID", help="this cycle's run (default: the one that waits)")
    parser.add_argument("--watch", action="store_true", help="wait for runs and train each, until SIGTERM")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("~/.nightschool/remote"),
        metavar="DIR",
        help="where runs are kept (default: %(default)s)",
    )
    parser.add_argument("--no-tls", action="store_false", dest="tls", default=None, help="speak to it without TLS")
    return parser


def _fail(message: str, code: int) -> int:
    print(f"nightschool train: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
