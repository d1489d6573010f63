"""The state of one task's tools: JSON that tools keep, and a workspace folder. A value that forks.

Owns how a workspace is made, copied and thrown away. A candidate runs in a fork; the winner's fork is
kept, the others are discarded, and nothing of them reaches a sibling or the continuation.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nightschool_server.chat import canonical_json
from nightschool_server.tools.forking import copy_tree, remove_tree

if TYPE_CHECKING:
    from nightschool_server.app import App


@dataclass(frozen=True)
class ToolState:
    """What tools have done so far in one task."""

    data: str
    """`ToolContext.state` as canonical JSON."""
    root: Path
    """Workspaces are made in this folder."""
    workspace: Path | None = None
    """None until a tool writes a file."""
    variables: bytes = field(default=b"", repr=False)
    """Of code that the model wrote, as a sandbox pickled them; only ever read inside one."""

    @classmethod
    def initial(cls, app: App, root: Path) -> ToolState:
        """The state in which a task of `app` begins; makes `root` where it is missing."""
        root = root.resolve()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(canonical_json(dict(app.initial_state)), root)

    def fork(self) -> ToolState:
        """A state of its own with the same content. Copies the workspace if there is a file in it.

        Raises what `forking.copy_tree` raises.
        """
        if self.workspace is None or not self.workspace.is_dir() or not any(self.workspace.iterdir()):
            return replace(self, workspace=None)
        copy = self.make_workspace()
        try:
            copy_tree(self.workspace, copy)
        except BaseException:
            remove_tree(copy)
            raise
        # A tool that kept an absolute path must not reach the original from the copy.
        return replace(self, data=self.data.replace(_in_json(self.workspace), _in_json(copy)), workspace=copy)

    def make_workspace(self) -> Path:
        """A fresh empty folder under `root`, private to this user."""
        return Path(tempfile.mkdtemp(prefix="workspace-", dir=self.root))

    def discard(self) -> None:
        """Remove the workspace. Idempotent."""
        if self.workspace is not None:
            remove_tree(self.workspace)


def _in_json(path: Path) -> str:
    return canonical_json(str(path))[1:-1]
