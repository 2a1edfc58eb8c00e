"""What a service counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheStats:
    """What the adapter cache did since it was made, and what it holds now.

    Args:
        hits: Adapters that were in memory, or on their way there.
        disk_hits: Adapters that were read from the local disk.
        misses: Adapters that were read from the store.
        failures: Loads that failed.
        evictions: Adapters that left the memory to make room.
        entries: Adapters in memory.
        size_bytes: Their bytes.
        pinned_bytes: The bytes of those that requests use now; they may exceed the budget.
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
    """Counters since the service was opened, and gauges of now.

    Args:
        snapshot: The snapshot in service.
        snapshots_held: How many are open: more than one while requests of a former one are under way.
        requests: Requests that ended, by (mode, outcome); an outcome is `ok`, `overloaded`, `deadline`,
            `cancelled`, `too_long` or `failed`.
        open: Requests that were accepted and have not ended.
        waiting: Of these, the ones whose prompts are ready and that have no slot yet.
        running: Slots in use.
        slots: Slots in all.
        new_tokens: Tokens generated for requests that were answered.
        prompt_tokens: Their prompt tokens.
        fallbacks: Passages that went into a prompt because their adapters could not be had.
        steps: Steps of the decoder.
        step_s: Seconds that the last step took.
        swaps: Times that another snapshot came into service.
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
