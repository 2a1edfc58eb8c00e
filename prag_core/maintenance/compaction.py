"""Many small ledger parts become few, and shards with few live adapters smaller ones.

A row counts if it is the latest of its passage, and the passage is in a corpus that is still needed or the row is
young: a passage that changed is another one, so without the corpus the adapters of old texts would stay for ever.

New shards and new ledger parts are written first. Then `adapters/<recipe>/compactions/<id>.json` names the new parts
and those that they replace: this write is the commit, and from then on the old ones count no more for the next run.
Snapshots go on naming the old parts until one that names the new ones is published; `gc` takes the old ones away when
no kept snapshot names them. Killed in between, the old parts count, and the same compaction writes the same again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.identity import fingerprint, seal
from prag_core.records import LedgerRow, from_table, schema, to_table
from prag_core.store.ledger import Compaction, compactions
from prag_core.store.objects import Store
from prag_core.store.shards import keys_in, move_adapters

ROWS_PER_PART = 100_000
# A shard of which at most this share of the tensors' bytes is live is worth writing anew.
FEW_LIVE = 0.5

# A ledger row and whether it counts.
MARKED = pa.schema([*schema(LedgerRow), pa.field("live", pa.bool_())])


def record_compaction(store: Store, recipe: str, compaction: Compaction) -> None:
    """Commit a compaction whose parts are stored.

    What the parts it replaces had replaced themselves, it replaces too: whichever goes first, none comes back.
    """
    there = {*store.list(f"adapters/{recipe}/ledger", ".parquet")}
    replaces = {*compaction.replaces}
    for earlier in compactions(store, recipe).values():
        if replaces & {*earlier.parts}:
            replaces |= {*earlier.replaces} & there
    whole = Compaction(compaction.parts, tuple(sorted(replaces - {*compaction.parts})))
    name = f"adapters/{recipe}/compactions/{fingerprint(whole)}.json"
    store.put_json(name, seal(asdict(whole)))


def corpus_keys(store: Store, part: str) -> pa.Table:
    """Return the keys of a corpus part as `mark_live` takes them: as ledger rows of which nothing else is known.

    Raises:
        StoreError: when the part is missing or damaged.
    """
    keys = store.get_columns(part, ["key"])["key"]
    columns = [keys if field.name == "key" else pa.nulls(len(keys), field.type) for field in schema(LedgerRow)]
    return pa.table(columns, schema=schema(LedgerRow))


def mark_live(rows: pa.Table, forgotten: Sequence[str], since: float) -> pa.Table:
    """Return the ledger rows among `rows`, with whether each counts.

    It does if it is the latest of its key, its key is not forgotten, and a corpus has the key or the row was created
    after `since`. Of rows of one time, as a retried task may leave them, one counts.

    Args:
        rows: Ledger rows, and for each passage of a corpus its key (`corpus_keys`); all rows of a key.
        forgotten: Keys that do not count.
        since: Seconds since the epoch.
    """
    is_ledger = pc.is_valid(rows["shard"])
    wanted = rows.filter(pc.invert(is_ledger))["key"].combine_chunks()
    rows = rows.filter(is_ledger)
    if not rows.num_rows:
        return MARKED.empty_table()
    numbered = rows.append_column("row", pa.array(range(rows.num_rows)))
    latest = numbered.sort_by([("created", "ascending"), ("shard", "ascending"), ("offset", "ascending")])
    last = latest.group_by("key", use_threads=False).aggregate([("row", "last")])["row_last"]
    counts = pc.is_in(numbered["row"], value_set=last.combine_chunks())
    erased = pc.is_in(rows["key"], value_set=pa.array(forgotten, pa.string()))
    needed = pc.or_(pc.is_in(rows["key"], value_set=wanted), pc.greater(rows["created"], since))
    return rows.append_column(MARKED.field("live"), pc.and_(pc.and_(counts, needed), pc.invert(erased)))


def settle(store: Store, marked: pa.Table, forgotten: Sequence[str]) -> list[LedgerRow]:
    """Return the live rows, those of shards that are worth it with their new place in a shard written for them.

    Args:
        store: The store.
        marked: Rows with the columns of `MARKED`; all rows of a shard must be among them.
        forgotten: Keys of which no byte may stay.

    Raises:
        StoreError: when the store cannot be read or written.
    """
    rows = from_table(LedgerRow, marked)
    live = marked["live"].to_pylist()
    groups: dict[str, list[tuple[LedgerRow, bool]]] = {}
    for row, counts in zip(rows, live, strict=True):
        groups.setdefault(row.shard, []).append((row, counts))
    settled: list[LedgerRow] = []
    for shard in sorted(groups):
        kept = [row for row, counts in groups[shard] if counts]
        if kept and (len(kept) < len(groups[shard]) or forgotten) and _is_worth_moving(store, shard, kept, forgotten):
            moved = move_adapters(store, shard, kept)
            # A damaged shard is for `repair`, not to be dropped here.
            kept = moved if len(moved) == len(kept) else kept
        settled += kept
    return settled


def _is_worth_moving(store: Store, shard: str, live: Sequence[LedgerRow], forgotten: Collection[str]) -> bool:
    found = keys_in(store, shard)
    if found is None:
        return False
    keys, tensor_bytes = found
    return not keys.isdisjoint(forgotten) or sum(row.length for row in live) <= FEW_LIVE * tensor_bytes


def put_rows(store: Store, recipe: str, rows: Sequence[LedgerRow]) -> str:
    """Write ledger rows as one part, in the order of their keys, and return its name."""
    return store.put_table(
        f"adapters/{recipe}/ledger", to_table(LedgerRow, sorted(rows, key=lambda row: (row.key, row.created)))
    )
