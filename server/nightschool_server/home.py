"""The home folder: where everything that outlives a process lies.

config.toml        what the operator set
nightschool.db     the store (SQLite, WAL)
blobs/ab/abcd...   images and files by sha256
adapters/NAME/     immutable adapter folders
workspaces/ID/     what the tools of a running task write, gone when the task is
cycles/ID/         the learner's working files: resolved config, training data, checkpoints, plots
cli.token          an admin token in plain text, mode 0600, for the command line on this machine
learner.token      the same for the learner, so that the audit trail tells it from people
server.json        {"address", "pid", "version"} while a server runs
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CORRECTIONS_FILE, THUMBS_FILE = "corrections.jsonl", "thumbs.jsonl"
"""In a cycle's folder: what callers said of answers, as the learner's `feedback_rows.py` writes it."""

REPORT_FILES = {"html": "report.html", "json": "report.json"}
"""In a cycle's folder, once it has ended: what it did and why, as the learner's `report/files.py` writes it."""


@dataclass(frozen=True)
class Home:
    """Paths below one home folder; `create` makes the folders."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def database(self) -> Path:
        return self.path / "nightschool.db"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def cycles(self) -> Path:
        return self.path / "cycles"

    @property
    def workspaces(self) -> Path:
        return self.path / "workspaces"

    @property
    def cli_token(self) -> Path:
        return self.path / "cli.token"

    @property
    def learner_token(self) -> Path:
        return self.path / "learner.token"

    @property
    def server_file(self) -> Path:
        return self.path / "server.json"

    def create(self) -> Home:
        """Make the folders, private to this user. Returns itself."""
        for folder in (self.path, self.blobs, self.adapters, self.cycles):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self
