"""What is in a file: whether it is what its type says, and its text for those who only read.

Files come from users and from programs that a model wrote, and parsers of their formats have a long history: pictures,
XLSX, DOCX and PDF are opened in the sandbox of code actions, by programs of our own. CSV and plain text are read here.

Owns the readers. What a file is made or found for is not known here.
"""

from __future__ import annotations

import asyncio
import csv
import io
import math
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nightschool_server.chat import File
from nightschool_server.image_check import check_image
from nightschool_server.sandbox.folder import remove
from nightschool_server.sandbox.sandbox import CodeStep, Reply, Sandbox
from nightschool_server.store.store import Store
from nightschool_server.uninterrupted import obtained, uninterrupted

from nightschool_learner.errors import StageFailedError
from nightschool_learner.synthesis.plan import type_of

MAX_READ_BYTES = 32 * 2**20
"""A larger file is known by its name alone."""
MAX_PLAIN_BYTES = 64 * 1024
"""Of a text file that is looked at."""
MAX_ROWS = 200
"""Of a table that is shown."""
IMAGE_TYPES = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp"})
NEEDED = ("PIL", "openpyxl", "docx", "reportlab", "pypdf")
"""What the sandbox's programs import."""

_MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-", "xlsx": b"PK\x03\x04", "docx": b"PK\x03\x04"}

_READERS = {
    "png": """
from PIL import Image
def read():
    with Image.open(NAME) as image:
        image.load()
        if all(low == high for low, high in image.convert("RGB").getextrema()):
            raise ValueError("the picture is of one colour everywhere")
        print(f"{image.format} picture, {image.width} x {image.height} pixels")
read()
""",
    "xlsx": """
import openpyxl
def read():
    book, found = openpyxl.load_workbook(NAME, read_only=True), False
    for sheet in book.worksheets:
        print(f"sheet {sheet.title}:")
        for row in sheet.iter_rows(values_only=True, max_row=ROWS):
            cells = ["" if value is None else str(value) for value in row]
            if any(cells):
                found = True
                print(" | ".join(cells))
    if not found:
        raise ValueError("no cell holds anything")
read()
""",
    "docx": """
import docx
def read():
    document, found = docx.Document(NAME), False
    rows = [[cell.text for cell in row.cells] for table in document.tables for row in table.rows[:ROWS]]
    for line in [paragraph.text for paragraph in document.paragraphs] + [" | ".join(row) for row in rows]:
        if line.strip(" |"):
            found = True
            print(line)
    if not found:
        raise ValueError("the document holds no text")
read()
""",
    "pdf": """
import pypdf
def read():
    pages = pypdf.PdfReader(NAME).pages
    if not len(pages):
        raise ValueError("the document has no page")
    print(f"{len(pages)} pages")
    for page in pages[:20]:
        print(page.extract_text())
read()
""",
}


@dataclass(frozen=True)
class Reading:
    """What was found in a file."""

    text: str = ""
    """Its beginning; of a picture its size."""
    fault: str = ""
    """Why it is not what its type says; empty where it is."""


@dataclass(frozen=True)
class FileReader:
    """Reads files, those of formats with a parser in a sandbox."""

    sandbox: Sandbox | None
    """None: formats with a parser are not read at all."""
    folder: Path
    """Where its copies lie, each for as long as it is read."""

    async def check(self, type_: str, data: bytes, max_chars: int) -> Reading:
        """Read a file that must be of one of the types that can be made."""
        if not data:
            return Reading(fault="the file is empty")
        if not data.startswith(_MAGIC.get(type_, b"")):
            return Reading(fault=f"it does not begin as a {type_} does, but with {data[:8]!r}")
        if type_ == "csv":
            return _read_csv(data, max_chars)
        if type_ == "png":
            try:
                check_image(data)
            except ValueError as error:
                return Reading(fault=f"the picture {error}")
        assert self.sandbox is not None, "files are made where there is a sandbox"
        return await self._read_inside(self.sandbox, type_, data, max_chars)

    async def text_of(self, store: Store, file: File, max_chars: int) -> str:
        """What can be read of any file; empty where that is nothing. Raises NotFoundError where its bytes are gone."""
        if file.size_bytes > MAX_READ_BYTES:
            return ""
        data = await asyncio.to_thread(store.get_blob, file.sha256)
        type_ = type_of(file.name)
        if type_ in _READERS:
            return (await self.check(type_, data, max_chars)).text if self.sandbox is not None else ""
        plain = data[:MAX_PLAIN_BYTES]
        return "" if b"\0" in plain else plain.decode("utf-8", "replace")[:max_chars].strip()

    async def _read_inside(self, sandbox: Sandbox, type_: str, data: bytes, max_chars: int) -> Reading:
        root = Path(await obtained(partial(tempfile.mkdtemp, prefix="reading-", dir=self.folder), os.rmdir))
        workspace = root / "workspace"
        name = f"file.{type_}"
        try:
            workspace.mkdir(mode=0o700)
            await uninterrupted(asyncio.to_thread((workspace / name).write_bytes, data))
            code = f"NAME, ROWS = {name!r}, {MAX_ROWS}\n{_READERS[type_]}"
            result = await sandbox.run(CodeStep(code, (), b"", workspace, max_chars), no_tool, math.inf)
        finally:
            await uninterrupted(asyncio.to_thread(remove, root))
        if result.failure:
            return Reading(fault=result.fault or "it could not be opened")
        return Reading(result.output.strip())


def check_packages() -> None:
    """Raises StageFailedError where a package is missing that the sandbox's programs import."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise StageFailedError(
            f"learner.synthesize.files needs {', '.join(missing)} to make and to read files: "
            "pip install 'nightschool[files]'"
        )


async def no_tool(name: str, arguments: Any) -> Reply | None:
    """No program of synthesis has tools."""
    return Reply(f"error: there is no tool {name!r}", True, False)


def _read_csv(data: bytes, max_chars: int) -> Reading:
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        return Reading(fault=f"it cannot be read as CSV in UTF-8: {error}")
    filled = [row for row in rows if any(cell.strip() for cell in row)]
    if not filled:
        return Reading(fault="no cell holds anything")
    return Reading("\n".join(" | ".join(row) for row in filled[:MAX_ROWS])[:max_chars])
