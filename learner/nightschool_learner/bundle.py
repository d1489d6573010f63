"""A training run as one file: what a trainer on another host needs, and nothing of this machine.

    manifest.json   paths within the archive
    pairs.jsonl, anchors.jsonl
    parent/         the adapter to continue
    blobs/          the images that the pairs name

Owns the packing and the unpacking. The base model is not in it: the other host has it, and its digest is compared.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

from nightschool_learner.errors import StageFailedError
from nightschool_learner.manifest import Manifest, RunFolder, write_whole

_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


def pack(folder: RunFolder, target: Path) -> None:
    """Write the run of `folder` to `target`, whole or not at all."""
    manifest = folder.read_manifest()
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with tarfile.open(partial, "w") as tar:
        _add_text(tar, "manifest.json", _portable(manifest).model_dump_json(indent=1))
        tar.add(manifest.pairs_file, "pairs.jsonl")
        if manifest.anchors_file is not None:
            tar.add(manifest.anchors_file, "anchors.jsonl")
        if manifest.parent_folder is not None:
            tar.add(manifest.parent_folder, "parent")
        for sha256 in _images(manifest):
            tar.add(manifest.blobs / sha256[:2] / sha256, f"blobs/{sha256[:2]}/{sha256}")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def unpack(archive: Path, path: Path, base_model: str) -> RunFolder:
    """A run folder at `path` for a trainer on this host. Raises StageFailedError where it is not such an archive."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(path, filter="data")
        packed = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise StageFailedError(f"{archive} is no training run of nightschool ({error}): fetch it again") from error
    local = {
        "base_model": base_model,
        "pairs_file": path / "pairs.jsonl",
        "anchors_file": path / "anchors.jsonl" if packed.anchors_file else None,
        "parent_folder": path / "parent" if packed.parent_folder else None,
        "blobs": path / "blobs",
        "output": path,
    }
    write_whole(path / "manifest.json", packed.model_copy(update=local).model_dump_json(indent=1))
    return RunFolder(path)


def _portable(manifest: Manifest) -> Manifest:
    return manifest.model_copy(
        update={
            "base_model": Path(manifest.base_model).name,
            "pairs_file": Path("pairs.jsonl"),
            "anchors_file": Path("anchors.jsonl") if manifest.anchors_file else None,
            "parent_folder": Path("parent") if manifest.parent_folder else None,
            "blobs": Path("blobs"),
            "output": Path(),
        }
    )


def _images(manifest: Manifest) -> list[str]:
    """The images that pairs and anchors name."""
    found: set[str] = set()
    for file in (manifest.pairs_file, manifest.anchors_file):
        for line in file.read_text(encoding="utf-8").splitlines() if file is not None else ():
            found.update(sha256 for sha256 in json.loads(line).get("images", ()) if _SHA256.fullmatch(sha256))
    return sorted(found)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))
