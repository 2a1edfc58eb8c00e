"""Objects as files of a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from prag_core.store.backend import StoredObject
from prag_core.store.filesystem import FilesystemBackend

# The file below the root that `swap` locks. Other files of this ending are locks of earlier versions.
_LOCK = "store.lock"


class FolderBackend(FilesystemBackend):
    """Objects as files below one folder of this machine, or of a mounted disk that several machines share.

    Promises:
        Atomic put: the bytes go into a scratch file beside the object (`<name>.<random>.tmp`), which is then renamed.
        Durability: bytes and names are on the disk (fsync) before `put` returns. After a power cut an object is as
            before or whole.
        Conditional write: `swap` reads, compares and writes under a lock on one file of the folder. It holds between
            all processes that see the same folder, if the file system supports `flock`.

    A process that is killed during a write leaves its scratch file, which `prag gc` removes.
    """

    def put(self, name: str, data: bytes) -> None:
        with self._scratch(name) as scratch:
            scratch.write_bytes(data)

    def put_file(self, name: str, source: Path) -> None:
        with self._scratch(name) as scratch:
            shutil.copyfile(source, scratch)

    def find(self, folder: str) -> list[StoredObject]:
        found = []
        for place, _, files in os.walk(self._path(folder), onerror=_raise_unless_absent):  # fsspec would ignore errors
            for path in (Path(place, file) for file in files if not file.endswith(".lock")):
                with contextlib.suppress(FileNotFoundError):  # removed since the folder was read
                    status = path.stat()
                    name = str(path)[len(self._root) + 1 :]
                    found.append(StoredObject(name, status.st_size, status.st_mtime))
        return found

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        _make_folder(Path(self._root))
        with FileLock(self._path(_LOCK)):
            if self.get(name) != expected:
                return False
            self.put(name, new)
        return True

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """Yield a scratch file beside an object, and rename it to the object when the block ends without an error."""
        path = Path(self._path(name))
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
