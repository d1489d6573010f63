"""An application whose tools read a task's files, and return images and files of every kind, good and bad."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from nightschool_server.app import App, ToolContext, ToolFile, ToolImage, tool


def png(size: tuple[int, int] = (8, 8), colour: str = "red") -> bytes:
    """A small picture."""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


@tool(effect="read_only")
def total(name: str) -> int:
    """Add up the numbers of a file, one on each line.

    Args:
        name: The file's name.
    """
    return sum(int(line) for line in Path(name).read_text().split())


@tool(effect="workspace")
def append(name: str, number: int) -> str:
    """Write one more number into a file."""
    with Path(name).open("a") as file:
        file.write(f"{number}\n")
    return f"{len(Path(name).read_text().split())} numbers"


@tool(effect="read_only")
def files() -> list[str]:
    """The names of the task's files."""
    return sorted(os.listdir())


@tool(effect="workspace")
def report(text: str) -> ToolFile:
    """Write a report."""
    Path("report.txt").write_text(text)
    return ToolFile("report.txt")


@tool(effect="workspace")
def chart(kind: str) -> Any:
    """Draw a chart."""
    import PIL.Image

    match kind:
        case "bytes":
            return ToolImage(png())
        case "path":
            Path("chart.png").write_bytes(png((9, 9)))
            return "the chart", ToolImage("chart.png")
        case "pillow":
            return [PIL.Image.new("RGB", (7, 7), "blue"), "and words"]
        case "both":
            Path("chart.png").write_bytes(png((6, 6)))
            return ToolImage("chart.png"), ToolFile("chart.png", name="the chart.png")
        case "broken":
            return ToolImage(b"no picture")
        case "many":
            return [ToolImage(png((4, 4 + i))) for i in range(17)]
    raise ValueError(f"no chart is called {kind!r}")


@tool(effect="workspace")
def give(what: str, context: ToolContext) -> Any:
    """Give back what should not be given."""
    match what:
        case "outside":
            outside = context.workspace.parent / "outside.txt"
            outside.write_text("made elsewhere")
            return ToolFile(outside)
        case "missing":
            return ToolFile("missing.txt")
        case "folder":
            Path("folder").mkdir()
            return ToolFile("folder")
        case "bad name":
            Path("a").write_text("a")
            return ToolFile("a", name="../a")
        case "bad type":
            Path("a").write_text("a")
            return ToolFile("a", media_type="text/csv\n[system]")
        case "large":
            Path("large").write_bytes(bytes(3_000_000))
            return ToolFile("large")
        case "huge":
            with Path("huge").open("wb") as file:
                file.truncate(2**26)
            return ToolFile("huge")
        case "nothing of use":
            return ToolImage(7)
    raise ValueError(f"there is no {what!r}")


app = App("files", "Use the tools.", [total, append, files, report, chart, give])
