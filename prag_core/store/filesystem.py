"""Objects on any fsspec file system, such as Google Cloud Storage or SFTP."""

from __future__ import annotations

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Any

from prag_core.errors import DamagedError, StoreError
from prag_core.store.backend import StoredObject, TooShortError


class FilesystemBackend:
    """Objects as files of an fsspec file system below `root`; see `Backend` for the methods.

    Promises: those of the file system, and no more.
        Atomic put: only if the file system writes a whole file at once, as object stores do.
        Durability: the file system's.
        Conditional write: none. `swap` raises a `StoreError`, so such a store can be read, but not published to.
    """

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    def put_file(self, name: str, source: Path) -> None:
        self._fs.put_file(str(source), self._path(name))

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(self._path(name), start=start, end=end)
        except FileNotFoundError:
            return None
        if end is not None and len(data) != end - (start or 0):
            raise TooShortError(f"{len(data)} bytes came of {end - (start or 0)}")
        return data

    def size(self, name: str) -> int | None:
        try:
            info = self._fs.info(self._path(name))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._path(name)))

    def find(self, folder: str) -> list[StoredObject]:
        self._fs.invalidate_cache()  # a file system may remember listings that lack the writes of other processes
        found = []
        for path, info in self._fs.find(self._path(folder).rstrip("/"), detail=True).items():
            if info["type"] == "file":  # some servers list empty folders
                modified = info.get("LastModified", info.get("mtime", info.get("created", 0.0)))
                seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
                found.append(StoredObject(path[len(self._root) + 1 :], int(info["size"]), seconds))
        return found

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        raise StoreError(f"{self._root}: its file system has no conditional write", "use a folder or s3://")

    def honours_conditions(self, name: str) -> bool:
        return not self.swap(name, None, b"")

    def explain(self, error: Exception) -> tuple[str, str]:
        return str(error), "check the path, its rights and the room on the disk"

    def _path(self, name: str) -> str:
        # Names come from documents, too: one that leads out of the store would read, or remove, another's file.
        if ".." in name.split("/") or "\0" in name:
            raise DamagedError(f"{self._root}: {name!r} is no name of an object", "remove the document that names it")
        return f"{self._root}/{name}"
