"""A bounded cache of bytes on the local disk, shared by the processes of a machine.

It does not check the bytes: callers verify their checksum. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# The folder is trimmed each time a process has written this fraction of the budget: one part in 16.
_SLACK = 16


class DiskCache:
    """A folder of files `<group>/<name>`, of which those used most recently are kept.

    A file appears whole or not at all. Each process trims the folder after it has written a sixteenth of the budget, so
    the folder exceeds the budget by at most that much per writing process. A full or broken disk is no error: nothing
    is kept then.

    Args:
        folder: The folder; created if missing.
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
            log.warning("%s: cannot be used as a cache: %s", folder, error)
        self._trim()

    def get(self, group: str, name: str) -> bytes | None:
        """Return the bytes stored under a name, or None; reading counts as a use."""
        path = self._folder / group / name
        try:
            data = path.read_bytes()
            path.touch(exist_ok=True)
        except OSError:
            return None
        return data

    def put(self, group: str, name: str, data: bytes) -> None:
        """Store bytes under a name, unless they exceed the budget or the disk is full."""
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
        """Remove the bytes stored under a name, if any."""
        with contextlib.suppress(OSError):
            (self._folder / group / name).unlink()

    def _trim(self) -> None:
        """Measure the folder, and remove the least recently used files until the rest is within the budget."""
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
        except Timeout:  # another process is trimming
            return
        except OSError as error:
            log.warning("%s: cannot be trimmed: %s", self._folder, error)
            return
        with self._lock:
            self.size_bytes = size_bytes

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of each file, including incomplete ones that a killed process left."""
        found = []
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found
