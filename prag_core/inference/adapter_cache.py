"""A cache of adapters in memory, within a byte budget, in front of the local disk and the store.

The key of an entry is recipe, passage and checksum, so it cannot be confused with another recipe's adapter or with one
that was trained again. Adapters in use are pinned. An adapter that several requests need at the same time is fetched
once, and one that could not be fetched is not tried again for a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cachetools import TTLCache

from prag_core.errors import AdapterError
from prag_core.inference.disk_cache import DiskCache
from prag_core.inference.stats import CacheStats
from prag_core.llm.lora import Factors, FlatAdapter, flatten_adapter
from prag_core.store.adapters import LedgerSource
from prag_core.store.ledger import AdapterLocation

log = logging.getLogger(__name__)

# How many failures are remembered; beyond that, the oldest are forgotten and tried again.
_MAX_FAILURES = 100_000

Loaded = FlatAdapter | AdapterError


class AdapterId(NamedTuple):
    """Identifies an adapter's bytes: recipe fingerprint, passage key and checksum."""

    recipe: str
    key: str
    checksum: str


@dataclass(eq=False)
class _Entry:
    """An adapter that is in memory or being loaded. `pins` counts the leases that hold it."""

    future: Future[Loaded]
    pins: int = 0
    size_bytes: int = 0


class AdapterLease:
    """The adapters of one request, loaded or being loaded; they are pinned until `release`."""

    def __init__(
        self, cache: AdapterCache, entries: Mapping[str, tuple[AdapterId, _Entry]], failed: Mapping[str, AdapterError]
    ) -> None:
        self._cache = cache
        self._entries = dict(entries)
        self._failed = failed

    @property
    def futures(self) -> list[Future[Loaded]]:
        """The futures of the adapters that are in memory or being loaded."""
        return [entry.future for _, entry in self._entries.values()]

    def adapters(self, waited_s: float) -> dict[str, Loaded]:
        """Return each adapter, laid out for a forward pass, or an error if it could not be loaded by now.

        Adapters with an error are released. `waited_s` is how long the caller waited; it is part of the error.
        """
        found: dict[str, Loaded] = dict(self._failed)
        for key, (_, entry) in self._entries.items():
            if entry.future.done() and not entry.future.cancelled():
                found[key] = entry.future.result()
            else:
                found[key] = AdapterError(f"adapter {key}: was not loaded within {waited_s:g} s")
        late = [key for key, loaded in found.items() if isinstance(loaded, AdapterError) and key in self._entries]
        self._cache._unpin([self._entries.pop(key) for key in late])
        return found

    def release(self) -> None:
        """Unpin the adapters. A second call does nothing."""
        entries, self._entries = self._entries, {}
        self._cache._unpin(entries.values())


class AdapterCache:
    """The adapters that a replica keeps in memory; safe to use from many threads.

    Args:
        size_bytes: The memory budget. Pinned adapters may exceed it.
        dtype: The dtype of the model, in which adapters are kept.
        page_locked: Whether to keep them in page-locked memory, from which a GPU copies without waiting.
        disk: The cache on the local disk; None for none.
        threads: How many adapters are fetched at the same time.
        negative_ttl_s: How long to wait before retrying an adapter that could not be loaded.
        clock: Returns the time in seconds; for the expiry of failures.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        dtype: torch.dtype,
        page_locked: bool = False,
        disk: DiskCache | None = None,
        threads: int = 16,
        negative_ttl_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = size_bytes
        self._dtype = dtype
        self._page_locked = page_locked
        self._disk = disk
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._entries: OrderedDict[AdapterId, _Entry] = OrderedDict()
        self._failed: TTLCache[AdapterId, AdapterError] = TTLCache(_MAX_FAILURES, negative_ttl_s, timer=clock)
        self._size_bytes = 0
        self._hits = self._disk_hits = self._misses = self._failures = self._evictions = 0

    def lease(self, source: LedgerSource, keys: Iterable[str]) -> AdapterLease:
        """Start to load those adapters of `keys` that are not in memory, and return without waiting for them."""
        rows: list[AdapterLocation] = []
        failed: dict[str, AdapterError] = {}
        for key in dict.fromkeys(keys):
            try:
                rows.append(source.row(key))
            except AdapterError as unknown:
                failed[key] = unknown
        entries = {}
        with self._lock:
            for row in rows:
                id = AdapterId(source.recipe, row.key, row.checksum)
                if (known := self._failed.get(id)) is not None:
                    failed[row.key] = known
                else:
                    entries[row.key] = id, self._pin(id, source, row)
        return AdapterLease(self, entries, failed)

    def stats(self) -> CacheStats:
        """Return the counters since the cache was made, and its present content."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                disk_hits=self._disk_hits,
                misses=self._misses,
                failures=self._failures,
                evictions=self._evictions,
                entries=sum(entry.size_bytes > 0 for entry in self._entries.values()),
                size_bytes=self._size_bytes,
                pinned_bytes=sum(entry.size_bytes for entry in self._entries.values() if entry.pins),
                disk_bytes=self._disk.size_bytes if self._disk is not None else 0,
            )

    def close(self) -> None:
        """Fetch nothing more; loads that have not started are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pin(self, id: AdapterId, source: LedgerSource, row: AdapterLocation) -> _Entry:
        """Return the entry of an adapter and pin it; call it with the lock held."""
        entry = self._entries.get(id)
        if entry is None:
            entry = self._entries[id] = _Entry(self._pool.submit(self._load, id, source, row))
        else:
            self._hits += 1
            self._entries.move_to_end(id)
        entry.pins += 1
        return entry

    def _unpin(self, entries: Iterable[tuple[AdapterId, _Entry]]) -> None:
        with self._lock:
            for id, entry in entries:
                entry.pins -= 1
                # Cancel a load that has not started and that nobody waits for, to free its thread for others.
                if not entry.pins and entry.future.cancel():
                    del self._entries[id]
            self._evict()

    def _load(self, id: AdapterId, source: LedgerSource, row: AdapterLocation) -> Loaded:
        try:
            factors, from_disk = self._read(id, source, row)
            # Here, in a fetching thread: all other rows would wait for the decoding thread.
            adapter = flatten_adapter(source.layout, factors, dtype=self._dtype, page_locked=self._page_locked)
        except Exception as error:  # no error may fail a request or leave an entry behind
            if not isinstance(error, AdapterError):
                log.exception("adapter %s: loading failed", id.key)
                error = AdapterError(f"adapter {id.key}: {type(error).__name__}: {error}")
            with self._lock:
                self._failures += 1
                self._failed[id] = error
                del self._entries[id]
            return error
        with self._lock:
            self._disk_hits += from_disk
            self._misses += not from_disk
            entry = self._entries[id]
            entry.size_bytes = _memory_bytes(adapter)
            self._size_bytes += entry.size_bytes
            self._evict()
        return adapter

    def _read(self, id: AdapterId, source: LedgerSource, row: AdapterLocation) -> tuple[Factors, bool]:
        """Return verified factors, and whether they came from the local disk."""
        if self._disk is not None and (data := self._disk.get(id.recipe, id.checksum)) is not None:
            try:
                return source.unpack(row, data), True
            except AdapterError:
                log.warning("adapter %s: its copy on the local disk is damaged; fetching it again", id.key)
                self._disk.remove(id.recipe, id.checksum)
        data = source.read(row)
        factors = source.unpack(row, data)
        if self._disk is not None:
            self._disk.put(id.recipe, id.checksum, data)
        return factors, False

    def _evict(self) -> None:
        """Drop the least recently used entries until the rest is within the budget; call it with the lock held."""
        if self._size_bytes <= self._budget:
            return
        for id, entry in list(self._entries.items()):
            if entry.pins or not entry.size_bytes:
                continue
            del self._entries[id]
            self._size_bytes -= entry.size_bytes
            self._evictions += 1
            if self._size_bytes <= self._budget:
                return


def _memory_bytes(adapter: FlatAdapter) -> int:
    """Return how much memory an adapter takes; torch allocates page-locked memory in powers of two."""
    return 1 << (adapter.nbytes - 1).bit_length() if adapter.is_pinned() else adapter.nbytes
