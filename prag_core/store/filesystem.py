"""Objects on any fsspec file system, such as Google Cloud Storage or SFTP."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any

from prag_core.errors import StoreError
from prag_core.store.backend import StoredObject, check_length, explain_file_error


class FilesystemBackend:
    """Objects as files of an fsspec file system for which there is no backend of its own.

    Promises: what the file system promises, and no more.
        Atomic put: only if the file system writes a whole file at once, as object stores do.
        Durability: the file system's.
        Conditional write: none. `swap` raises a `StoreError`, so such a store can be read, but not published to.
    """

    failures = (OSError,)

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it."""
        self._fs.pipe_file(f"{self._root}/{name}", data)

    def put_file(self, name: str, source: Path) -> None:
        """Write an object from a local file."""
        self._fs.put_file(str(source), f"{self._root}/{name}")

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes `start` to `end` of an object, or None if there is no such object.

        Raises:
            TooShortError: if the object has fewer than `end` bytes.
        """
        try:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=end)
        except FileNotFoundError:
            return None
        return check_length(data, start, end)

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, or None if there is no such object."""
        try:
            info = self._fs.info(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def exists(self, name: str) -> bool:
        """Return whether there is an object or a folder of this name."""
        return bool(self._fs.exists(f"{self._root}/{name}"))

    def find(self, folder: str) -> list[StoredObject]:
        """Return all objects at any depth below a folder."""
        return find_files(self._fs, self._root, folder)

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        """Raise a `StoreError`: there is no conditional write."""
        raise StoreError(f"{self._root}: its file system has no conditional write", "use a folder or s3://")

    def honours_conditions(self, name: str) -> bool:
        """Raise a `StoreError`: there is no conditional write."""
        return self.swap(name, None, b"")

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return what a failure means, and what to do about it."""
        return explain_file_error(error)


def find_files(fs: Any, root: str, folder: str) -> list[StoredObject]:
    """Return the files at any depth below a folder of an fsspec file system, with names relative to `root`."""
    fs.invalidate_cache()  # some file systems remember listings, in which the writes of other processes are missing
    found = []
    for path, info in fs.find(f"{root}/{folder}".rstrip("/"), detail=True).items():
        if info["type"] == "file":  # some servers list empty folders
            modified = info.get("LastModified", info.get("mtime", info.get("created", 0.0)))
            seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
            found.append(StoredObject(path[len(root) + 1 :], int(info["size"]), seconds))
    return found
