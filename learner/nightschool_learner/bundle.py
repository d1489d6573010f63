"""A training run as one file: what a trainer on another host needs, and nothing of this machine.

    manifest.json   paths within the archive
    pairs.jsonl, anchors.jsonl, corrections.jsonl, thumbs.jsonl
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

_NAMES = {
    "pairs_file": "pairs.jsonl",
    "anchors_file": "anchors.jsonl",
    "corrections_file": "corrections.jsonl",
    "thumbs_file": "thumbs.jsonl",
}
"""Files of rows, by the manifest's field."""


def pack(folder: RunFolder, target: Path) -> None:
    """Write the run of `folder` to `target`, whole or not at all."""
    manifest = folder.read_manifest()
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with tarfile.open(partial, "w") as tar:
        _add_text(tar, "manifest.json", _portable(manifest).model_dump_json(indent=1))
        for field, path in _files(manifest).items():
            tar.add(path, _NAMES[field])
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
        **{field: path / _NAMES[field] for field in _files(packed)},
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
            **{field: Path(_NAMES[field]) for field in _files(manifest)},
            "parent_folder": Path("parent") if manifest.parent_folder else None,
            "blobs": Path("blobs"),
            "output": Path(),
        }
    )


def _files(manifest: Manifest) -> dict[str, Path]:
    """The files of rows that a manifest names, by its field."""
    return {field: path for field in _NAMES if (path := getattr(manifest, field)) is not None}


def _images(manifest: Manifest) -> list[str]:
    """The images that the rows name."""
    found: set[str] = set()
    for file in _files(manifest).values():
        for line in file.read_text(encoding="utf-8").splitlines():
            found.update(sha256 for sha256 in json.loads(line).get("images", ()) if _SHA256.fullmatch(sha256))
    return sorted(found)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))
