"""The snapshots that a service has open: the one in service, and former ones that requests still use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from prag_core.inference.loaded_snapshot import LoadedSnapshot
from prag_core.llm.layout import LoraLayout

log = logging.getLogger(__name__)


class SnapshotPool:
    """Counts the users of each open snapshot; a former snapshot is closed when its last user releases it.

    Its methods may be called from any thread, `swap` from one at a time. `opener` opens a snapshot of the store by its
    id, or the one in service for None; `current` returns the id of the latter. `on_unused` is called with a layout when
    no open snapshot has adapters of it any more.
    """

    def __init__(
        self,
        opener: Callable[[str | None], LoadedSnapshot],
        current: Callable[[], str | None],
        on_unused: Callable[[LoraLayout], None],
    ) -> None:
        self._opener = opener
        self._current = current
        self._on_unused = on_unused
        self._lock = threading.Lock()
        self._served = opener(None)
        self._users: dict[LoadedSnapshot, int] = {self._served: 0}
        self.swaps = 0

    def __len__(self) -> int:
        return len(self._users)

    @property
    def served_id(self) -> str:
        """The id of the snapshot that new requests use."""
        return self._served.id

    def acquire(self) -> LoadedSnapshot:
        """Return the snapshot in service, which stays open until `release`."""
        with self._lock:
            self._users[self._served] += 1
            return self._served

    def release(self, snapshot: LoadedSnapshot) -> None:
        """End one use of a snapshot."""
        with self._lock:
            if snapshot not in self._users:  # the pool was closed meanwhile
                return
            self._users[snapshot] -= 1
            if self._users[snapshot] or snapshot is self._served:
                return
            del self._users[snapshot]
            unused = all(other.layout != snapshot.layout for other in self._users)
        close_snapshot(snapshot)
        if unused:
            self._on_unused(snapshot.layout)

    def swap(self) -> bool:
        """Open the snapshot in service if it is another one than here, and use it from now on; returns whether it was.

        Raises:
            StoreError, RetrievalError, ModelError: when the new one cannot be opened; the old one stays.
        """
        id = self._current()
        if id is None or id == self._served.id:
            return False
        opened = self._opener(id)
        with self._lock:
            former, self._served = self._served, opened
            self._users[opened] = 0
            self._users[former] += 1
            self.swaps += 1
        log.info("snapshot %s came into service after %s", opened.id, former.id)
        self.release(former)
        return True

    def clear(self) -> list[LoadedSnapshot]:
        """Stop counting, and return the open snapshots, which are now the caller's to close."""
        with self._lock:
            snapshots, self._users = list(self._users), {}
        return snapshots


def close_snapshot(snapshot: LoadedSnapshot) -> None:
    """Close a snapshot that has no users; an error is logged, since no request fails by it."""
    try:
        snapshot.close()
    except Exception:
        log.exception("snapshot %s: cannot be closed", snapshot.id)
