"""Counters and gauges of a service and of its adapter cache."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheStats:
    """Counters of the adapter cache since it was made, and its present content.

    Args:
        hits: Requested adapters that were in memory or being loaded.
        disk_hits: Adapters that were read from the local disk.
        misses: Adapters that were read from the store.
        failures: Loads that failed.
        evictions: Adapters that were dropped from memory to make room.
        entries: Adapters in memory.
        size_bytes: The size of all adapters in memory.
        pinned_bytes: The size of those in use, which may exceed the budget.
        disk_bytes: Bytes on the local disk, as far as this process knows.
    """

    hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    failures: int = 0
    evictions: int = 0
    entries: int = 0
    size_bytes: int = 0
    pinned_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class ServiceStats:
    """Counters of a service since it was opened, and its present state.

    Args:
        snapshot: The id of the snapshot in service.
        snapshots_held: Open snapshots: more than one while requests still use a former one.
        requests: Ended requests by (mode, outcome); an outcome is `ok`, `overloaded`, `deadline`, `cancelled`,
            `too_long` or `failed`.
        open: Accepted requests that have not ended.
        waiting: Those of the open requests that are ready to decode and wait for a slot.
        running: Slots in use.
        slots: Slots in total.
        new_tokens: Tokens generated for answered requests.
        prompt_tokens: Prompt tokens of answered requests.
        fallbacks: Passages that went into a prompt because their adapters were not available.
        steps: Decoding steps.
        step_s: Duration of the last step in seconds.
        swaps: How often another snapshot came into service.
        cache: The adapter cache.
    """

    snapshot: str
    snapshots_held: int = 1
    requests: dict[tuple[str, str], int] = field(default_factory=dict)
    open: int = 0
    waiting: int = 0
    running: int = 0
    slots: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    fallbacks: int = 0
    steps: int = 0
    step_s: float = 0.0
    swaps: int = 0
    cache: CacheStats = field(default_factory=CacheStats)
