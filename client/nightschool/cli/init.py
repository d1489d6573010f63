"""`nightschool init`: a starter that runs, written from the files in `nightschool/starter`."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from nightschool.cli.output import note

STARTER_NAME = "starter"
"""What the files call the application; it becomes the folder's name."""

RENAMED = {"gitignore": ".gitignore"}
"""Files that would mean something to this project under their own name."""

NEXT = """next, in {folder}:
  export NIGHTSCHOOL_HOME="$PWD/home"
  nightschool check app:app --model MODEL
  nightschool serve --app app:app --model MODEL
  python client.py"""


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def init(*, folder: Path) -> None:
    """Write a starter into DIR, which must be empty or new: an application, held-out tasks, settings, a client, a test.

    Example: nightschool init my-agent
    """
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"{folder} is a file: name a folder that is empty or new")
    if folder.is_dir() and (found := next(iter(sorted(folder.iterdir())), None)):
        raise click.UsageError(f"{folder} is not empty ({found.name} is in it): name a folder that is empty or new")
    name = re.sub(r"[^\w.-]+", "-", folder.absolute().name).strip("-.") or STARTER_NAME
    for path, source in starter_files():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(source.read_text(encoding="utf-8").replace(STARTER_NAME, name), encoding="utf-8")
        click.echo(place)
    note(NEXT.format(folder=folder))


def starter_files() -> list[tuple[Path, Traversable]]:
    """Where each file of the starter goes below the folder, and the file, sorted."""
    pending, found = [(Path(), files("nightschool") / "starter")], []
    while pending:
        path, place = pending.pop()
        if place.is_file():
            found.append((path.with_name(RENAMED.get(path.name, path.name)), place))
        elif place.name != "__pycache__":
            pending += [(path / child.name, child) for child in place.iterdir()]
    return sorted(found, key=lambda pair: pair[0])
