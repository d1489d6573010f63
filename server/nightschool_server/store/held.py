"""Blobs that a caller holds: what it has uploaded, and the files that its tasks' tools gave back.

A hold lasts `agent.keep_uploads_s`; then, and where no request or task names the blob either, it is swept. Owns the
table `blob_holders`, the writing of a blob piece by piece, and who may read one: whoever holds it, or sent or was given
it in a logged request. Knowing a hash is not enough.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from nightschool_server.store.durable import TEMPORARY_PREFIX, sync_folder
from nightschool_server.store.store import Store


class IncomingBlob:
    """A blob on its way to the disk, of which no more than a chunk is in memory. Use as a context, or `close` it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=_staging(store))
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb")

    @property
    def sha256(self) -> str:
        """Of what was written up to now."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self._hash.update(chunk)
        self._file.write(chunk)
        self.size_bytes += len(chunk)

    def keep(self, caller: str, media_type: str) -> str:
        """Put the blob under its sha256, which is returned, held by `caller`. Durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        sha256, path = self.sha256, self._store.blob_path(self.sha256)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with self._store.transaction() as db:
            # Under the write lock, so that no sweep takes the file away between the two rows.
            if path.is_file():
                self._path.unlink()
            else:
                self._path.replace(path)
                sync_folder(path.parent)
            now = time.time()
            db.execute(
                "INSERT OR IGNORE INTO blobs (sha256, size_bytes, media_type, created_at) VALUES (?, ?, ?, ?)",
                (sha256, self.size_bytes, media_type, now),
            )
            db.execute(
                "INSERT INTO blob_holders (caller, sha256, created_at) VALUES (?, ?, ?) "
                "ON CONFLICT (caller, sha256) DO UPDATE SET created_at = excluded.created_at",
                (caller, sha256, now),
            )
        return sha256

    def close(self) -> None:
        """Give the descriptor back, and remove what was not kept. Idempotent."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def hold_bytes(store: Store, caller: str, data: bytes, media_type: str) -> str:
    """Keep bytes as a blob that `caller` holds. Returns its sha256."""
    with IncomingBlob(store) as blob:
        blob.write(data)
        return blob.keep(caller, media_type)


def hold_file(store: Store, caller: str, path: Path, media_type: str) -> str:
    """Keep a file as a blob that `caller` holds. Returns its sha256."""
    with IncomingBlob(store) as blob, path.open("rb") as file:
        while chunk := file.read(2**20):
            blob.write(chunk)
        return blob.keep(caller, media_type)


def readable_size(store: Store, caller: str | None, sha256: str) -> int | None:
    """The size of a blob that `caller` may read (None: an admin, who may read every one); None where it may not."""
    if not store.has_blob(sha256):
        return None
    if caller is not None:
        found = store.one(
            "SELECT 1 AS found FROM blob_holders WHERE caller = ? AND sha256 = ? UNION ALL "
            "SELECT 1 FROM request_blobs b JOIN requests r ON r.id = b.response_id WHERE r.caller = ? AND b.sha256 = ?",
            (caller, sha256, caller, sha256),
        )
        if found is None:
            return None
    return store.blob_path(sha256).stat().st_size


def held_bytes(store: Store, caller: str) -> int:
    """The size of all that `caller` holds."""
    row = store.query(
        "SELECT COALESCE(SUM(b.size_bytes), 0) AS held FROM blob_holders h JOIN blobs b ON b.sha256 = h.sha256 "
        "WHERE h.caller = ?",
        (caller,),
    )[0]
    return int(row["held"])


def release(store: Store, caller: str, hashes: Iterable[str]) -> None:
    """End the caller's hold of the blobs, and delete those that nothing else names."""
    released = list(hashes)
    with store.transaction() as db:
        db.executemany(
            "DELETE FROM blob_holders WHERE caller = ? AND sha256 = ?", [(caller, sha256) for sha256 in released]
        )
    store.delete_unused_blobs(released)


def _staging(store: Store) -> Path:
    """A folder of the blobs' own, so that the rename stays on one disk and a crash's rest is swept with theirs."""
    folder = store.home.blobs / "incoming"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
