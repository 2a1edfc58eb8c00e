"""Forgotten passages: who they are, what still holds them, and taking them out of small tables.

A tombstone in the snapshot in service ends a passage's use at once. Its bytes go later: a run makes a corpus and an
index without it, a compaction its ledger rows and adapters, and what is here the augmentations and rejects; `gc`
then removes the old objects. Objects are immutable, so each step writes without it before it removes what had it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, current_id, kept_snapshots, load_snapshot, pinned
from prag_core.store.tables import corpus_parts

# Tables with a row a passage, beside the corpus and the ledger.
_TABLES = ("augmentations", "rejects")


def holding(store: Store, snapshots: Iterable[Snapshot], keys: Sequence[str]) -> dict[str, list[str]]:
    """Return, by snapshot id, the corpus and ledger parts through which snapshots still hold bytes of these keys.

    Raises:
        StoreError: when one of these cannot be read.
    """
    seen: dict[str, bool] = {}
    found = {}
    for snapshot in snapshots:
        parts = [*corpus_parts(store, snapshot.corpus_version), *snapshot.ledger_parts]
        for part in parts:
            if part not in seen:
                seen[part] = _has_any(store, part, keys)
        if held := [part for part in parts if seen[part]]:
            found[snapshot.id] = held
    return found


def snapshots_to_keep(store: Store, newest: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return the ids of the snapshots that a collection keeps, and through which parts they hold forgotten passages.

    Kept are the `newest` so many, the pinned ones and the one in service (`kept_snapshots`), but for age alone none
    that holds a forgotten passage.

    Raises:
        StoreError: when a snapshot, or a part that one names, cannot be read.
    """
    kept = kept_snapshots(store, newest)
    serving = current_id(store)
    forgotten = load_snapshot(store, serving).tombstones if serving else ()
    if not forgotten:
        return kept, {}
    held = holding(store, [load_snapshot(store, id) for id in kept], forgotten)
    kept = [id for id in kept if id not in held or id in (serving, *pinned(store))]
    return kept, {id: parts for id, parts in held.items() if id in kept}


def erase_rows(store: Store, keys: Collection[str], check: Callable[[], None] = lambda: None) -> list[str]:
    """Take passages out of the augmentations and rejects, and return the parts that were removed for it.

    `check` is called before each removal, and raises when the store's lease is lost.

    Raises:
        StoreError: when the store cannot be read or written; what was erased until then stays so.
    """
    wanted = pa.array(sorted(keys), pa.string())
    removed = []
    for part in [name for folder in _TABLES for name in store.list(folder, ".parquet")]:
        if not _has_any(store, part, wanted):
            continue
        table = store.get_part(part)  # what is written anew has been checked: nothing altered gets a good name
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
