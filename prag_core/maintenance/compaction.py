"""Compaction: many small ledger parts become few, and shards with few live adapters become smaller.

A row is live if it is the latest of its passage, and a corpus that is still needed has the passage or the row is
young. The corpus matters because a passage whose text changed is a new passage: no later row ever supersedes the
adapter of the old text.

New shards and new ledger parts are written first. The commit is `adapters/<recipe>/compactions/<id>.json`, which says
which new parts replace which old ones. From then on the old parts do not count for the next run. Snapshots keep
naming the old parts until one that names the new ones is published; `prag gc` removes the old parts when no kept
snapshot names them. After a kill before the commit, the old parts count, and the same compaction writes the same
objects again.
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
# If at most this share of a shard's tensor bytes is live, its live adapters move into a new shard.
MAX_LIVE_SHARE = 0.5

# A ledger row, and whether it is live.
MARKED = pa.schema([*schema(LedgerRow), pa.field("live", pa.bool_())])


def record_compaction(store: Store, recipe: str, compaction: Compaction) -> None:
    """Commit a compaction whose parts are stored.

    The record also names the parts that an earlier compaction replaced by the parts that are replaced now. So no old
    part counts again when the earlier record is removed.
    """
    stored = {*store.list(f"adapters/{recipe}/ledger", ".parquet")}
    replaces = {*compaction.replaces}
    for earlier in compactions(store, recipe).values():
        if replaces & {*earlier.parts}:
            replaces |= {*earlier.replaces} & stored
    whole = Compaction(compaction.parts, tuple(sorted(replaces - {*compaction.parts})))
    name = f"adapters/{recipe}/compactions/{fingerprint(whole)}.json"
    store.put_json(name, seal(asdict(whole)))


def corpus_keys(store: Store, part: str) -> pa.Table:
    """Return the keys of a corpus part as ledger rows whose other columns are null, as `mark_live` takes them.

    Raises:
        StoreError: if the part is missing or damaged.
    """
    keys = store.get_columns(part, ["key"])["key"]
    columns = [keys if field.name == "key" else pa.nulls(len(keys), field.type) for field in schema(LedgerRow)]
    return pa.table(columns, schema=schema(LedgerRow))


def mark_live(rows: pa.Table, forgotten: Sequence[str], since: float) -> pa.Table:
    """Return the ledger rows among `rows`, with a column that says whether each is live.

    A row is live if it is the latest of its key, its key is not forgotten, and a corpus has the key or the row was
    created after `since`. Of several rows with the same time, as a retried task may leave them, one is live.

    Args:
        rows: Ledger rows, and the keys of corpora (`corpus_keys`). All rows of a key must be among them.
        forgotten: Keys whose rows are not live.
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
    is_latest = pc.is_in(numbered["row"], value_set=last.combine_chunks())
    is_forgotten = pc.is_in(rows["key"], value_set=pa.array(forgotten, pa.string()))
    is_needed = pc.or_(pc.is_in(rows["key"], value_set=wanted), pc.greater(rows["created"], since))
    return rows.append_column(MARKED.field("live"), pc.and_(pc.and_(is_latest, is_needed), pc.invert(is_forgotten)))


def compact_shards(store: Store, marked: pa.Table, forgotten: Sequence[str]) -> list[LedgerRow]:
    """Return the live rows. If a shard has few live adapters, or a forgotten one, move its live ones to a new shard.

    The rows of moved adapters have their new shard and offset.

    Args:
        store: The store.
        marked: Rows with the columns of `MARKED`. All rows of a shard must be among them.
        forgotten: Keys of which no byte may stay.
    """
    rows = from_table(LedgerRow, marked)
    live = marked["live"].to_pylist()
    groups: dict[str, list[tuple[LedgerRow, bool]]] = {}
    for row, is_live in zip(rows, live, strict=True):
        groups.setdefault(row.shard, []).append((row, is_live))
    settled: list[LedgerRow] = []
    for shard in sorted(groups):
        kept = [row for row, is_live in groups[shard] if is_live]
        if kept and (len(kept) < len(groups[shard]) or forgotten) and _is_worth_moving(store, shard, kept, forgotten):
            moved = move_adapters(store, shard, kept)
            # If the shard is damaged, leave it as it is for `prag repair`.
            kept = moved if len(moved) == len(kept) else kept
        settled += kept
    return settled


def _is_worth_moving(store: Store, shard: str, live: Sequence[LedgerRow], forgotten: Collection[str]) -> bool:
    found = keys_in(store, shard)
    if found is None:
        return False
    keys, tensor_bytes = found
    return not keys.isdisjoint(forgotten) or sum(row.length for row in live) <= MAX_LIVE_SHARE * tensor_bytes


def put_rows(store: Store, recipe: str, rows: Sequence[LedgerRow]) -> str:
    """Write ledger rows as one part, sorted by key, and return its name."""
    return store.put_table(
        f"adapters/{recipe}/ledger", to_table(LedgerRow, sorted(rows, key=lambda row: (row.key, row.created)))
    )
