"""Adapter folders: immutable, named by sequence and content, written aside and renamed into place.

    adapters/0007-3fae12bc/
        adapter_config.json         PEFT's, as it was trained
        adapter_model.safetensors   the weights
        manifest.json               what they are and where they come from

Copies from a source folder (or from bytes) only those two files, and reads a `provenance.json` beside them where the
trainer left one: {"cycle_id", "data", "training", "probe"}, each optional. Owns the files; what makes an adapter is
`format.py`'s, states and rows are the registry's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nightschool_server.adapters.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_names,
    check_weights,
    read_config,
    read_object,
    target_modules,
)
from nightschool_server.chat import canonical_json
from nightschool_server.errors import AdapterFormatError
from nightschool_server.home import Home
from nightschool_server.store.durable import TEMPORARY_PREFIX, sync_file, sync_folder, write_file

MANIFEST_FILE = "manifest.json"
PROVENANCE_FILE = "provenance.json"
MANIFEST_FORMAT = 1

Source = Path | Mapping[str, bytes]
"""A folder on this machine, or files by name."""


@dataclass(frozen=True)
class Staged:
    """A checked copy in a temporary folder, not yet an adapter."""

    path: Path
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Names, or one pattern."""
    size_bytes: int
    files: Mapping[str, str]
    """sha256 by file name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder and what its manifest says."""

    name: str
    path: Path
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    manifest: Mapping[str, Any]

    def verify(self, digest: str) -> None:
        """Hash the files again. Raises AdapterFormatError where they are not those of `digest`."""
        found = _digest({name: _sha256_of(self.path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})
        if found != digest or self.digest != digest:
            raise AdapterFormatError(
                f"adapter folder {self.path} has content {found[:8]}, its record says {digest[:8]}: the files were "
                "changed or damaged; delete the adapter and import it again"
            )


def stage(home: Home, source: Source, max_bytes: int) -> Staged:
    """Copy `source` into a temporary folder below `home.adapters` and check the copy.

    Raises AdapterFormatError; then nothing is left behind. The caller publishes or discards what it gets.
    """
    if isinstance(source, Path) and not source.is_dir():
        raise AdapterFormatError(
            f"{source} is not a folder on the server's machine: give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    check_names([path.name for path in source.iterdir()] if isinstance(source, Path) else source)
    path = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=home.adapters))
    try:
        left, files, size_bytes = max_bytes, {}, 0
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            files[name], size = _copy(source, name, path / name, left)
            left -= size
            size_bytes += size
        config = read_config(path / CONFIG_FILE)
        check_weights(path / WEIGHTS_FILE)
        return Staged(
            path=path,
            digest=_digest(files),
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            target_modules=target_modules(config),
            size_bytes=size_bytes,
            files=files,
            provenance=_read_provenance(source),
        )
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def publish(home: Home, staged: Staged, sequence: int, facts: Mapping[str, Any]) -> AdapterFolder:
    """Make a staged copy the adapter `<sequence>-<first 8 of its digest>`; durable when it returns.

    `facts` go into the manifest: base_model, base_model_digest, chat_template_digest, parent, cycle_id, created_at.
    """
    name = f"{sequence:04d}-{staged.digest[:8]}"
    manifest = {
        **{key: staged.provenance.get(key) for key in ("data", "training", "probe")},
        **facts,
        "format": MANIFEST_FORMAT,
        "name": name,
        "sequence": sequence,
        "digest": staged.digest,
        "files": dict(staged.files),
        "size_bytes": staged.size_bytes,
        "rank": staged.rank,
        "alpha": staged.alpha,
        "target_modules": list(staged.target_modules),
    }
    write_file(staged.path / MANIFEST_FILE, canonical_json(manifest).encode(), 0o444)
    sync_folder(staged.path)
    staged.path.rename(home.adapters / name)
    sync_folder(home.adapters)
    return open_folder(home, name)


def discard(staged: Staged) -> None:
    """Delete a staged copy that is not to be published."""
    shutil.rmtree(staged.path, ignore_errors=True)


def open_folder(home: Home, name: str) -> AdapterFolder:
    """The published adapter `name`, its files not hashed yet (see `verify`). Raises AdapterFormatError."""
    path = home.adapters / name
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (path / file).is_file()]
        if missing:
            raise AdapterFormatError(
                f"adapter folder {path} lacks {missing[0]}: delete the adapter and import it again"
            )
        if manifest["format"] != MANIFEST_FORMAT or manifest["name"] != name:
            raise ValueError(f"it describes {manifest['name']!r} in format {manifest['format']!r}")
        return AdapterFolder(
            name=name,
            path=path,
            digest=manifest["digest"],
            rank=manifest["rank"],
            alpha=manifest["alpha"],
            target_modules=tuple(manifest["target_modules"]),
            size_bytes=manifest["size_bytes"],
            manifest=manifest,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError(
            f"{path / MANIFEST_FILE} cannot be read ({error}): delete the adapter and import it again"
        ) from None


def delete_folder(home: Home, name: str) -> None:
    """Delete a published folder; a crash in between leaves a temporary one for `sweep`."""
    path = home.adapters / name
    if path.exists():
        doomed = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=home.adapters))
        path.rename(doomed / name)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(home: Home) -> None:
    """Delete what crashes left half written. Only while nothing is being imported."""
    for path in home.adapters.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def published_names(home: Home) -> list[str]:
    """Every folder that is not a temporary one, oldest first."""
    return sorted(
        path.name for path in home.adapters.iterdir() if path.is_dir() and not path.name.startswith(TEMPORARY_PREFIX)
    )


def _copy(source: Source, name: str, to: Path, max_bytes: int) -> tuple[str, int]:
    """Copy one file, flushed, read-only. Returns its sha256 and size; raises AdapterFormatError past `max_bytes`."""
    digest, size = hashlib.sha256(), 0
    with to.open("xb") as out:
        for chunk in _chunks(source, name):
            size += len(chunk)
            if size > max_bytes:
                raise AdapterFormatError(
                    f"{name} makes the adapter larger than adapters.max_folder_bytes: raise it, or lower the rank"
                )
            digest.update(chunk)
            out.write(chunk)
    to.chmod(0o444)
    sync_file(to)
    return digest.hexdigest(), size


def _chunks(source: Source, name: str) -> Iterator[bytes]:
    if not isinstance(source, Path):
        yield source[name]
        return
    try:
        with (source / name).open("rb") as file:
            yield from _blocks(file)
    except OSError as error:
        raise AdapterFormatError(f"{source / name} cannot be read ({error.strerror})") from None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(2**20):
        yield block


def _read_provenance(source: Source) -> dict[str, Any]:
    if isinstance(source, Path):
        path = source / PROVENANCE_FILE
        return read_object(path.read_bytes(), str(path)) if path.is_file() else {}
    return read_object(source[PROVENANCE_FILE], PROVENANCE_FILE) if PROVENANCE_FILE in source else {}


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read ({error.strerror}): import the adapter again") from None


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(dict(files)).encode()).hexdigest()
