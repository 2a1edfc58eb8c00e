"""Compaction of a store's ledger on Ray: few large parts replace many small ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.execution.tables import blocks_for_parts, group_by_columns, map_blocks, map_objects
from prag_core.maintenance.compaction import (
    MARKED,
    ROWS_PER_PART,
    compact_shards,
    corpus_keys,
    mark_live,
    put_rows,
    record_compaction,
)
from prag_core.maintenance.inventory import object_kind
from prag_core.records import LedgerRow, schema
from prag_core.store.ledger import Compaction
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, publish, with_ledger
from prag_core.store.tables import corpus_parts


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did, or would do.

    `rows` are the ledger rows of the snapshot in service. Of these, `forgotten` are rows of forgotten passages, and
    `superseded` rows that no longer count because of a later row, or because no needed corpus has the passage.
    `parts` ledger parts were there before, and `new_parts` were written (0: a dry run, or nothing had to be done).
    `snapshot` is the id of the snapshot in service afterwards.
    """

    rows: int
    superseded: int
    forgotten: int
    parts: int
    new_parts: int
    snapshot: str


def compact(
    store: Store,
    snapshot: Snapshot,
    profile: Profile,
    corpora: Collection[str],
    *,
    since: float,
    dry_run: bool = False,
) -> CompactionReport:
    """Replace the ledger parts and shards of a snapshot by fewer, fuller ones, and publish a snapshot with them.

    Nothing is done if the parts are few, all rows count, and no passage is forgotten.

    Args:
        store: The store.
        snapshot: The snapshot in service.
        profile: The resources to use.
        corpora: The versions of the corpora, besides the snapshot's, whose passages keep their adapters.
        since: Adapters that were committed later (seconds since the epoch) are kept, whether or not a corpus has
            their passage.
        dry_run: Count, but change nothing.

    Raises:
        ConflictError: if somebody published meanwhile. Nothing is lost, and the old parts stay in service.
        StoreError: if the store cannot be read or written.
    """
    forgotten = sorted(snapshot.tombstones)
    if not snapshot.ledger_parts:
        return CompactionReport(0, 0, 0, 0, 0, snapshot.id)
    with ray_session(profile):
        # 1. Which rows count? Group all rows by key.
        versions = sorted({snapshot.corpus_version, *corpora})
        parts = [*snapshot.ledger_parts, *(part for version in versions for part in corpus_parts(store, version))]
        blocks = blocks_for_parts(len(parts), profile)
        rows = group_by_columns(map_objects(parts, blocks, partial(_plain_rows, store)), ["key"], blocks)
        marked = map_blocks(rows, _mark, forgotten=forgotten, since=since).materialize()
        counts = map_blocks(marked, _count, forgotten=forgotten).take_all()
        total, live, erased = (sum(row[name] for row in counts) for name in ("rows", "live", "erased"))
        wanted = max(1, -(-live // ROWS_PER_PART))
        before = len(snapshot.ledger_parts)
        nothing = CompactionReport(total, total - live - erased, erased, before, 0, snapshot.id)
        if dry_run or (before < 2 * wanted and live == total and not forgotten):
            return nothing
        # 2. Move live adapters. Group the rows by shard; each group of shards becomes one ledger part.
        groups = group_by_columns(marked, ["shard"], wanted)
        written = map_blocks(
            groups, _compact_shards, store=store, recipe=snapshot.recipe, forgotten=forgotten
        ).take_all()
    made = tuple(sorted({row["part"] for row in written if row["part"]}))
    if {*made} == {*snapshot.ledger_parts}:
        return nothing
    # 3. Commit, and publish a snapshot that names the new parts.
    replaced = tuple(part for part in snapshot.ledger_parts if part not in made)
    record_compaction(store, snapshot.recipe, Compaction(made, replaced))
    new = with_ledger(snapshot, made, min(live, max(snapshot.adapters - erased, 0)))
    publish(store, new, replaces=snapshot.id)
    return CompactionReport(total, total - live - erased, erased, before, len(made), new.id)


def _plain_rows(store: Store, name: str) -> pa.Table:
    return store.get_table(LedgerRow, [name]) if object_kind(name) == "ledger" else corpus_keys(store, name)


def _mark(table: pa.Table, forgotten: list[str], since: float) -> pa.Table:
    return mark_live(table.select(schema(LedgerRow).names), forgotten, since)


def _count(table: pa.Table, forgotten: list[str]) -> pa.Table:
    live = pc.sum(table["live"].cast(pa.int64())).as_py() or 0
    erased = pc.sum(pc.is_in(table["key"], value_set=pa.array(forgotten, pa.string())).cast(pa.int64())).as_py() or 0
    return pa.table({"rows": [table.num_rows], "live": [live], "erased": [erased]})


def _compact_shards(table: pa.Table, store: Store, recipe: str, forgotten: list[str]) -> pa.Table:
    rows = compact_shards(store, table.select(MARKED.names), forgotten)
    return pa.table({"part": pa.array([put_rows(store, recipe, rows) if rows else ""], pa.string())})
