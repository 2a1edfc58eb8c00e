"""Objects in the memory of this process."""

from __future__ import annotations

import threading
from pathlib import Path

from prag_core.store.filesystem import FilesystemBackend

# fsspec's memory is the process's, so all stores of the process share this lock.
_SWAP_LOCK = threading.Lock()


class MemoryBackend(FilesystemBackend):
    """Objects in the memory of this process, for tests and first trials (`memory://<name>`).

    Promises:
        Atomic put: an object appears by one assignment.
        Durability: none. The objects go with the process, and other processes (Ray workers too) do not see them.
        Conditional write: `swap` holds between the threads of this process.
    """

    def put_file(self, name: str, source: Path) -> None:
        self.put(name, source.read_bytes())  # fsspec would copy piece by piece, and show a file that is half copied

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        with _SWAP_LOCK:
            if self.get(name) != expected:
                return False
            self.put(name, new)
        return True
