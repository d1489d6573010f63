"""What a tool returns beside text: images that the model sees, and files for whoever asked.

    return "the chart", ToolImage("chart.png")
    return ToolFile("report.csv")

Owns the two types and, in the child process of the call, the taking apart of a returned value. What is returned is left
in the workspace and named to the server, which checks it and keeps it: `returned.py`. Light: tool workers import it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTBOX_PREFIX = ".returned-"
"""Of the folder in the workspace for what does not lie there already; it is gone when the call is."""


@dataclass(frozen=True)
class ToolImage:
    """An image that the model sees: encoded bytes, the path of a file, or a Pillow image."""

    source: Any


@dataclass(frozen=True)
class ToolFile:
    """A file for whoever asked; the model sees a line with its name, type and size."""

    path: str | os.PathLike[str]
    name: str = ""
    """Empty: the path's own."""
    media_type: str = ""
    """Empty: what the name suggests."""


@dataclass
class Returned:
    """A returned value taken apart."""

    texts: list[Any] = field(default_factory=list)
    """What is neither an image nor a file, in its order."""
    items: list[dict[str, str]] = field(default_factory=list)
    """The images and files: `{"kind", "path"}` and, for a file, `{"name", "media_type"}`. Paths from the workspace."""


def take_apart(value: Any, workspace: Path) -> Returned:
    """Take apart a value that `holds_content`; what is made of bytes goes into an outbox."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    returned = Returned()
    outbox = Outbox(workspace)
    try:
        for part in parts:
            if _is_content(type(part)):
                returned.items.append(outbox.put(part))
            else:
                returned.texts.append(part)
    except BaseException:
        outbox.remove()
        raise
    return returned


def holds_content(value: Any) -> bool:
    """Whether a returned value is more than text. A list is judged by its few types, not its many items."""
    kinds = set(map(type, value)) if isinstance(value, (list, tuple)) else {type(value)}
    return any(map(_is_content, kinds))


class Outbox:
    """A folder in the workspace, made when it is needed."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._folder: Path | None = None
        self._num_files = 0

    def put(self, part: Any) -> dict[str, str]:
        """The entry of an image or a file. Raises TypeError and OSError with what is wrong."""
        if isinstance(part, ToolFile):
            path = Path(part.path)
            return {
                "kind": "file",
                "path": self._found(path),
                "name": part.name or path.name,
                "media_type": part.media_type,
            }
        source = part.source if isinstance(part, ToolImage) else part
        if isinstance(source, (bytes, bytearray, memoryview)):
            target = self._next()
            target.write_bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            return {"kind": "image", "path": self._found(Path(source))}
        elif _is_picture(type(source)):
            target = self._next()
            source.save(target, format="PNG")
        else:
            raise TypeError(f"ToolImage({type(source).__name__}) must be bytes, a path or a Pillow image")
        return {"kind": "image", "path": str(target.relative_to(self._workspace))}

    def remove(self) -> None:
        """Remove the folder with what is in it."""
        if self._folder is not None:
            import shutil  # Its compression libraries would weigh on the fork for every call.

            shutil.rmtree(self._folder, ignore_errors=True)

    def _found(self, path: Path) -> str:
        """The path from the workspace; a file that lies elsewhere is copied, as a tool may read what it likes."""
        whole = (self._workspace / path).resolve()
        if not whole.is_file():
            raise FileNotFoundError(f"the tool returned {str(path)!r}, which is not a file")
        if whole.is_relative_to(self._workspace.resolve()):
            return str(whole.relative_to(self._workspace.resolve()))
        import shutil

        target = self._next()
        shutil.copyfile(whole, target)
        return str(target.relative_to(self._workspace))

    def _next(self) -> Path:
        if self._folder is None:
            self._folder = self._workspace / f"{OUTBOX_PREFIX}{os.urandom(8).hex()}"
            self._folder.mkdir(mode=0o700)
        self._num_files += 1
        return self._folder / str(self._num_files)


def _is_content(kind: type) -> bool:
    return issubclass(kind, (ToolImage, ToolFile)) or _is_picture(kind)


def _is_picture(kind: type) -> bool:
    """Whether it is Pillow's; asked without importing Pillow, which the tool has where it returns a picture."""
    return any(base.__module__.startswith("PIL.") and base.__name__ == "Image" for base in kind.__mro__)
