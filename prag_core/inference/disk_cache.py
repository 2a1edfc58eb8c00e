"""Bytes on the local disk that can be had again elsewhere: bounded, and shared by the processes of a machine.

Nothing here vouches for the bytes: who reads them knows their checksum. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# What is written before the folder is counted again, as a share of its budget.
_SLACK = 16


class DiskCache:
    """A folder of files `<group>/<name>`, of which the ones used last are kept.

    A file appears whole or not at all. The folder is trimmed when this process has written a sixteenth of the budget
    since it was last counted: it exceeds the budget by no more than that for each process that writes. A disk that
    is full or broken is no error: the bytes are then fetched elsewhere.

    Args:
        folder: Where; made when missing.
        size_bytes: The budget.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._budget = size_bytes
        self._lock = threading.Lock()
        self._written = 0
        self.size_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s: nothing is kept there: %s", folder, error)
        self._trim()

    def get(self, group: str, name: str) -> bytes | None:
        """Return the bytes that were put under a name, or None; reading counts as a use."""
        path = self._folder / group / name
        try:
            data = path.read_bytes()
            path.touch(exist_ok=True)
        except OSError:
            return None
        return data

    def put(self, group: str, name: str, data: bytes) -> None:
        """Keep bytes under a name, unless there is no room for them."""
        if len(data) > self._budget:
            return
        path = self._folder / group / name
        scratch = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            scratch.write_bytes(data)
            scratch.replace(path)
        except OSError as error:
            log.warning("%s: cannot be written: %s", path, error)
            with contextlib.suppress(OSError):
                scratch.unlink()
            return
        with self._lock:
            self._written += len(data)
            self.size_bytes += len(data)
            due = self._written > self._budget // _SLACK
        if due:
            self._trim()

    def remove(self, group: str, name: str) -> None:
        """Forget what lies under a name."""
        with contextlib.suppress(OSError):
            (self._folder / group / name).unlink()

    def _trim(self) -> None:
        """Count the folder, and remove what was used longest ago until the rest keeps to the budget."""
        with self._lock:
            self._written = 0
        try:
            with FileLock(self._folder / ".lock", timeout=0):
                files = sorted(self._files())
                size_bytes = sum(size for _, size, _ in files)
                for _, size, path in files:
                    if size_bytes <= self._budget:
                        break
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        log.warning("%s: cannot be removed: %s", path, error)
                    else:
                        size_bytes -= size
        except Timeout:  # another process does it
            return
        except OSError as error:
            log.warning("%s: cannot be trimmed: %s", self._folder, error)
            return
        with self._lock:
            self.size_bytes = size_bytes

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of each file; also of those that a killed process left half-written."""
        found = []
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found
