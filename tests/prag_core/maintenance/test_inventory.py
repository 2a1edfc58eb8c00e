"""The inventory of a store."""

from __future__ import annotations

from pathlib import Path

from prag_core.maintenance.inventory import count_usage, object_kind
from prag_core.store.objects import Store
from tests.helpers.stores import (
    PASSAGES,
)


def test_usage_counts_every_byte(store: Store) -> None:
    objects = store.objects()
    counted = count_usage(store, objects, 7)
    on_disk = sum(
        path.stat().st_size for path in Path(store.url).rglob("*") if path.suffix != ".lock" and path.is_file()
    )
    assert sum(counted.size_bytes.values()) == on_disk
    assert counted.adapters == len(PASSAGES)
    assert counted.objects["shards"] == 4
    shards = sum(item.size_bytes for item in objects if object_kind(item.name) in ("shards", "ledger"))
    assert counted.bytes_per_adapter == shards / len(PASSAGES)
