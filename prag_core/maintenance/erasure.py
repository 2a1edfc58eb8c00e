"""Forgotten passages: which snapshots still hold them, and erasing them from augmentations and rejects.

A tombstone in the snapshot in service ends the use of a passage at once. Its bytes go later: a run makes a corpus and
an index without it, a compaction ledger parts and shards, and `erase_rows` augmentations and rejects. Then `prag gc`
removes the old objects. Objects are immutable, so each step writes the new object before it removes the old one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.store.objects import Store
from prag_core.store.pins import kept_snapshots, pinned
from prag_core.store.snapshot import Snapshot, current_id, load_snapshot
from prag_core.store.tables import corpus_parts

# Tables with one row for each passage, besides the corpus and the ledger.
_TABLES = ("augmentations", "rejects")


def parts_holding(store: Store, snapshots: Iterable[Snapshot], keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the corpus and ledger parts that hold any of these keys, by the id of the snapshot that names them.

    Raises:
        StoreError: if a part cannot be read.
    """
    holds: dict[str, bool] = {}
    found = {}
    for snapshot in snapshots:
        parts = [*corpus_parts(store, snapshot.corpus_version), *snapshot.ledger_parts]
        for part in parts:
            if part not in holds:
                holds[part] = _has_any(store, part, keys)
        if held := [part for part in parts if holds[part]]:
            found[snapshot.id] = held
    return found


def parts_with(store: Store, names: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Return those of these corpus and ledger parts that hold any of these keys.

    Raises:
        StoreError: if a part cannot be read.
    """
    return [name for name in names if _has_any(store, name, keys)]


def snapshots_to_keep(store: Store, newest: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return the ids of the snapshots that `prag gc` keeps, and the parts in which they hold forgotten passages.

    These are the snapshots of `kept_snapshots`, without those that hold a forgotten passage and are neither pinned
    nor in service.

    Raises:
        StoreError: if a snapshot, or a part that it names, cannot be read.
    """
    kept = kept_snapshots(store, newest)
    serving = current_id(store)
    forgotten = load_snapshot(store, serving).tombstones if serving else ()
    if not forgotten:
        return kept, {}
    held = parts_holding(store, [load_snapshot(store, id) for id in kept], forgotten)
    kept = [id for id in kept if id not in held or id in (serving, *pinned(store))]
    return kept, {id: parts for id, parts in held.items() if id in kept}


def erase_rows(store: Store, keys: Collection[str], check: Callable[[], None] = lambda: None) -> list[str]:
    """Erase passages from the augmentations and rejects, and return the names of the parts that were removed.

    A part that holds one of the passages is replaced by a part without them. `check` is called before each removal;
    it raises if the lease is lost.

    Raises:
        StoreError: if the store cannot be read or written. What was erased before stays erased.
    """
    wanted = pa.array(sorted(keys), pa.string())
    removed = []
    for part in [name for folder in _TABLES for name in store.list(folder, ".parquet")]:
        if not _has_any(store, part, wanted):
            continue
        table = store.get_part(part)  # checked against its name, so that no altered row gets a new checksum
        rest = table.filter(pc.invert(pc.is_in(table["key"], value_set=wanted)))
        if rest.num_rows:
            store.put_table(posixpath.dirname(part), rest)
        check()
        store.remove(part)
        removed.append(part)
    return removed


def _has_any(store: Store, part: str, keys: Sequence[str] | pa.Array) -> bool:
    wanted = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string())
    return bool(pc.any(pc.is_in(store.get_columns(part, ["key"])["key"], value_set=wanted)).as_py())
