"""The trainer's process around a run: its niceness and threads, its end with its parent's, its hold on the folder.

A run of several processes is one command of `accelerate launch` (on GPUs, each process has its own) or of torch's own
launcher (on a CPU, where accelerate wants MPI). The trainer turns into that launcher, so that pid and group stay what
the learner knows; the launched ones find their rank in the environment.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Manifest, RunFolder
from nightschool_learner.niceness import be_nice

PARENT_POLL_S = 0.5
LOCK_WAIT_S = 3.0
"""How long a start waits for a dying predecessor to let go of the folder."""


def be_quiet(manifest: Manifest) -> None:
    """Yield the processor to serving, before anything heavy is imported."""
    be_nice(manifest.nice)
    threads = str(manifest.num_threads)
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def import_silently() -> None:
    """Import what takes seconds, without progress bars in the log."""
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def rank() -> int:
    """Which of a run's processes this is; 0 writes."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher started this process beside others."""
    return "RANK" in os.environ


def launch_command(manifest: Path, num_processes: int, *, on_gpus: bool) -> list[str]:
    """The command that runs the trainer in several processes on this machine."""
    trainer = ["-m", "nightschool_learner.trainer", str(manifest)]
    if on_gpus:
        options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
        launcher = ["-m", "accelerate.commands.launch", *options, "--num_processes", str(num_processes)]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, *launcher, *trainer]


def launch(manifest: Manifest, path: Path) -> None:
    """Become the launcher of a run of several processes. Raises StageFailedError where there are too few GPUs."""
    from nightschool_server.machine import this_machine

    num_gpus = len(this_machine().gpus)
    if num_gpus and num_gpus < manifest.num_processes:
        raise StageFailedError(
            f"learner.train.num_processes is {manifest.num_processes}, this machine has {num_gpus} GPUs: lower it"
        )
    command = launch_command(path, manifest.num_processes, on_gpus=bool(num_gpus))
    os.execv(command[0], command)


def die_with_parent() -> None:
    """End this process within PARENT_POLL_S of the learner's end, however it ended. Portable, hence a thread.

    A launched process has the launcher in between, which does not look after its own parent.
    """
    started = _ancestors()

    def watch() -> None:
        while _ancestors() == started:
            time.sleep(PARENT_POLL_S)
        os._exit(3)

    threading.Thread(target=watch, name="parent_watch", daemon=True).start()


def _ancestors() -> tuple[int, int]:
    """The pids of the parent and, for a launched process, of its parent."""
    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).ppid() if is_launched() else 0
    except psutil.NoSuchProcess:
        return parent, 0


@contextmanager
def lock(folder: RunFolder) -> Iterator[None]:
    """Hold the run: two trainers never write one folder. The lock ends with the process; of several, rank 0 has it."""
    if rank():
        yield
        return
    deadline = time.monotonic() + LOCK_WAIT_S
    with folder.lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"another trainer holds {folder.path} for more than {LOCK_WAIT_S:g} s") from None
                time.sleep(0.05)
        yield
