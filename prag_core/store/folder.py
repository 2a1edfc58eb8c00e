"""Objects as files of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from prag_core.store.backend import StoredObject, check_length, explain_file_error

# The file below the root that `swap` locks. Other files of this ending are locks of earlier versions.
_LOCK = "store.lock"


class FolderBackend:
    """Objects as files below one folder of this machine, or of a mounted disk that several machines share.

    Promises:
        Atomic put: the bytes go into a scratch file beside the object (`<name>.<random>.tmp`), which is then renamed.
        Durability: bytes and names are on the disk (fsync) before `put` returns. After a power cut an object is as
            before or whole.
        Conditional write: `swap` reads, compares and writes under a lock on one file of the folder. It holds between
            all processes that see the same folder, if the file system supports `flock`.

    A process that is killed during a write leaves its scratch file, which `prag gc` removes.
    """

    failures = (OSError,)

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it; it is on the disk when this returns."""
        with self._scratch(name) as scratch:
            scratch.write_bytes(data)

    def put_file(self, name: str, source: Path) -> None:
        """Write an object as a copy of a local file."""
        with self._scratch(name) as scratch:
            shutil.copyfile(source, scratch)

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes `start` to `end` of an object, or None if there is no such object.

        Raises:
            TooShortError: if the object has fewer than `end` bytes.
        """
        try:
            with (self._root / name).open("rb") as stream:
                stream.seek(start or 0)
                data = stream.read(-1 if end is None else max(0, end - (start or 0)))
        except FileNotFoundError:
            return None
        return check_length(data, start, end)

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, or None if there is no such object."""
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def exists(self, name: str) -> bool:
        """Return whether there is an object or a folder of this name."""
        return (self._root / name).exists()

    def find(self, folder: str) -> list[StoredObject]:
        """Return all objects at any depth below a folder; lock files are not objects."""
        found = []
        for place, _, files in os.walk(self._root / folder, onerror=_raise_unless_absent, followlinks=True):
            for file in files:
                path = Path(place, file)
                if file.endswith(".lock"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since the folder was read
                    status = path.stat()
                    name = path.relative_to(self._root).as_posix()
                    found.append(StoredObject(name, status.st_size, status.st_mtime))
        return found

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        (self._root / name).unlink(missing_ok=True)

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        """Replace an object if its bytes are `expected` (None: if it does not exist); return whether it did."""
        _make_folder(self._root)
        with FileLock(self._root / _LOCK):
            if self.get(name) != expected:
                return False
            self.put(name, new)
        return True

    def honours_conditions(self, name: str) -> bool:
        """Return whether `swap` refuses to create an object that exists."""
        return not self.swap(name, None, b"")

    def explain(self, error: Exception) -> tuple[str, str]:
        """Return what a failure means, and what to do about it."""
        return explain_file_error(error)

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """Yield a scratch file beside an object, and rename it to the object when the block ends without an error."""
        path = self._root / name
        _make_folder(path.parent)
        scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield scratch
            _sync(scratch)
            scratch.replace(path)
            _sync(path.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _raise_unless_absent(error: OSError) -> None:
    # A folder that may not be read, such as a disk's `lost+found`, is not part of the store. Any other failure must
    # not look like an empty folder: objects that are needed would seem to be garbage.
    if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        raise error


def _make_folder(folder: Path) -> None:
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync(made.parent)


def _sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
