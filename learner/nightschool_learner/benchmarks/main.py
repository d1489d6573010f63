"""`nightschool evaluate`: the served agent on a published benchmark.

Runs every task of the data set on a server, keeps each attempt, scores all of them and writes what they came to.
Started again on the same output folder, it runs what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nightschool
from nightschool import AsyncClient
from nightschool.errors import CALLER_MISTAKES

from nightschool_learner.benchmarks.attempts import AttemptLog, Run
from nightschool_learner.benchmarks.gaia import read_gaia
from nightschool_learner.benchmarks.gta import read_gta
from nightschool_learner.benchmarks.report import Progress, table_of, write_report
from nightschool_learner.benchmarks.run import Examination
from nightschool_learner.benchmarks.similarity import Embedder
from nightschool_learner.benchmarks.task import Benchmark
from nightschool_learner.errors import BenchmarkError, LearnerError

FAULT = 1
USER_MISTAKE = 2
INTERRUPTED = 130

EXAMPLE = "example:\n  nightschool evaluate {name} --data {folder}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and score. Exit codes: 0 done, 1 a fault of the server, 2 the user's mistake, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        summary = asyncio.run(_evaluate(options))
    except BenchmarkError as error:
        return _fail(str(error), USER_MISTAKE)
    except nightschool.NightschoolError as error:
        return _fail(error.message, USER_MISTAKE if error.code in CALLER_MISTAKES else FAULT)
    except LearnerError as error:
        return _fail(str(error), FAULT)
    except OSError as error:
        return _fail(str(error), USER_MISTAKE)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("interrupted; what was attempted is kept", INTERRUPTED)
    text = json.dumps(summary, ensure_ascii=False, indent=2) if options.json else "\n".join(table_of(summary))
    print(text)  # noqa: T201
    return 0


async def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    benchmark = await asyncio.to_thread(_read, options)
    tasks = benchmark.tasks[: options.limit or None]
    async with AsyncClient(options.address, tls=options.tls) as client:
        run = await _run_of(client, benchmark, options)
        default = client.settings.home / "benchmarks" / benchmark.name / run.adapter
        folder = (options.out or default).expanduser().absolute()
        with AttemptLog(folder, run) as log:
            known = sum(task.id in log.attempts for task in tasks)
            progress = Progress(benchmark, len(tasks), known)
            wait_s = options.server_wait
            examination = Examination(client, run, log, options.concurrency, wait_s, progress.add)
            await examination.examine(tasks)
            summary = await asyncio.to_thread(write_report, benchmark, run, log)
    print(f"rows and summary: {folder}", file=sys.stderr)  # noqa: T201
    return summary


def _read(options: argparse.Namespace) -> Benchmark:
    folder = options.data.expanduser().absolute()
    if options.benchmark == "gaia":
        return read_gaia(folder)
    return read_gta(folder, Embedder(options.embedder.expanduser()).similarity if options.embedder else None)


async def _run_of(client: AsyncClient, benchmark: Benchmark, options: argparse.Namespace) -> Run:
    """What is about to be run. The adapter is named, so that a promotion in between changes nothing."""
    models = await client.models()
    found = next((m for m in models if (m.name == options.adapter if options.adapter else m.active)), None)
    if found is None:
        names = ", ".join(model.name for model in models)
        raise BenchmarkError(f"--adapter {options.adapter!r} is not served; the server has {names}")
    return Run(
        benchmark.name,
        benchmark.digest,
        found.base_model,
        found.name,
        options.max_steps,
        options.max_tokens,
        options.timeout,
        found.accepts_images,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool evaluate", description="Run the served agent on a published benchmark and score it."
    )
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    gta = _benchmark_parser(names, "gta", "GTA: dataset.json, toolmeta.json and image/", "gta_dataset")
    gta.add_argument(
        "--embedder", type=Path, metavar="DIR", help="encoder for free-text answers, e.g. all-mpnet-base-v2"
    )
    _benchmark_parser(names, "gaia", "GAIA: metadata.jsonl and the files beside it", "GAIA/2023/validation")
    return parser


def _benchmark_parser(names: Any, name: str, what: str, folder: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    epilog = EXAMPLE.format(name=name, folder=folder)
    parser: argparse.ArgumentParser = names.add_parser(
        name, help=what, description=what, epilog=epilog, formatter_class=form
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/NAME/ADAPTER in the home folder")
    parser.add_argument("--adapter", default="", metavar="NAME", help="default: the active one")
    parser.add_argument("--concurrency", type=_positive, default=4, metavar="N", help="tasks in flight (%(default)s)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N tasks")
    parser.add_argument("--max-steps", type=_positive, metavar="N", help="of one task; default: the server's")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="of one step; default: the server's")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of one task (%(default)s)")
    parser.add_argument(
        "--server-wait", type=float, default=120.0, metavar="S", help="how long the server may be away (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="write the summary as JSON")
    parser.add_argument("--address", help="host:port of the server (default: as for every command)")
    parser.add_argument("--no-tls", action="store_false", dest="tls", default=None, help="speak to it without TLS")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _fail(message: str, code: int) -> int:
    print(f"nightschool evaluate: {message}", file=sys.stderr)  # noqa: T201
    return code
