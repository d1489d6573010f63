"""The trainer's process around a run: its niceness and threads, its end with its parent's, its hold on the folder."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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


def die_with_parent(parent: int) -> None:
    """End this process within PARENT_POLL_S of the learner's end, however it ended. Portable, hence a thread."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(3)

    threading.Thread(target=watch, name="parent_watch", daemon=True).start()


@contextmanager
def lock(folder: RunFolder) -> Iterator[None]:
    """Hold the run: two trainers never write one folder. The lock ends with the process."""
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
