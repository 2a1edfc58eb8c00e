"""Compacting the ledger on Ray: few full parts in place of many small ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.execution.tables import group_by_columns, partitions_for, spread_names, whole_blocks
from prag_core.maintenance.compaction import (
    MARKED,
    ROWS_PER_PART,
    corpus_keys,
    mark_live,
    put_rows,
    record_compaction,
    settle,
)
from prag_core.maintenance.inventory import kind_of
from prag_core.records import LedgerRow, schema
from prag_core.store.ledger import Compaction
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, publish, with_ledger
from prag_core.store.tables import corpus_parts


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did, or would do.

    `rows` are those of the snapshot in service, `superseded` and `forgotten` those of them that no longer count (a
    row is superseded by a later one, or by corpora that have its passage no more); `parts` the ledger parts before,
    `new_parts` after (0: it was not worth it, or only looked at); `snapshot` the one in service after it.
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
    """Put few ledger parts and full shards in the place of the snapshot's, and publish a snapshot that names them.

    Nothing is done when the parts are few, all rows count, and no shard holds a forgotten passage.

    Args:
        store: The store.
        snapshot: The one in service.
        profile: On what it runs.
        corpora: The versions of the corpora, besides the snapshot's, whose passages keep their adapters.
        since: Adapters that were made later, in seconds since the epoch, are kept whosesoever they are.
        dry_run: Only look.

    Raises:
        ConflictError: when somebody published meanwhile; nothing is lost, and the old parts stay in service.
        StoreError: when the store cannot be read or written.
    """
    forgotten = sorted(snapshot.tombstones)
    if not snapshot.ledger_parts:
        return CompactionReport(0, 0, 0, 0, 0, snapshot.id)
    with ray_session(profile):
        # 1. Which rows count: all rows of a key meet.
        versions = sorted({snapshot.corpus_version, *corpora})
        parts = [*snapshot.ledger_parts, *(part for version in versions for part in corpus_parts(store, version))]
        rows = spread_names(parts, profile).map_batches(_plain_rows, **whole_blocks(), fn_kwargs={"store": store})
        marked = (
            group_by_columns(rows, ["key"], partitions_for(len(parts), profile))
            .map_batches(_mark, **whole_blocks(), fn_kwargs={"forgotten": forgotten, "since": since})
            .materialize()
        )
        counts = marked.map_batches(_count, **whole_blocks(), fn_kwargs={"forgotten": forgotten}).take_all()
        total, live, erased = (sum(row[name] for row in counts) for name in ("rows", "live", "erased"))
        wanted = max(1, -(-live // ROWS_PER_PART))
        before = len(snapshot.ledger_parts)
        nothing = CompactionReport(total, total - live - erased, erased, before, 0, snapshot.id)
        if dry_run or (before < 2 * wanted and live == total and not forgotten):
            return nothing
        # 2. Where they lie: all rows of a shard meet, and each group of shards becomes one part.
        arguments = {"store": store, "recipe": snapshot.recipe, "forgotten": forgotten}
        written = (
            group_by_columns(marked, ["shard"], wanted)
            .map_batches(_settle, **whole_blocks(), fn_kwargs=arguments)
            .take_all()
        )
    made = tuple(sorted({row["part"] for row in written if row["part"]}))
    if {*made} == {*snapshot.ledger_parts}:
        return nothing
    # 3. The commit, and the snapshot that shows it.
    replaced = tuple(part for part in snapshot.ledger_parts if part not in made)
    record_compaction(store, snapshot.recipe, Compaction(made, replaced))
    new = with_ledger(snapshot, made, min(live, max(snapshot.adapters - erased, 0)))
    publish(store, new, replaces=snapshot.id)
    return CompactionReport(total, total - live - erased, erased, before, len(made), new.id)


def _plain_rows(table: pa.Table, store: Store) -> Iterator[pa.Table]:
    for name in table["name"].to_pylist():
        yield store.get_table(LedgerRow, [name]) if kind_of(name) == "ledger" else corpus_keys(store, name)


def _mark(table: pa.Table, forgotten: list[str], since: float) -> pa.Table:
    rows = table.select(schema(LedgerRow).names) if table.num_columns else schema(LedgerRow).empty_table()
    return mark_live(rows, forgotten, since)


def _count(table: pa.Table, forgotten: list[str]) -> pa.Table:
    if not table.num_columns:
        return pa.table({"rows": [0], "live": [0], "erased": [0]})
    live = pc.sum(table["live"].cast(pa.int64())).as_py() or 0
    erased = pc.sum(pc.is_in(table["key"], value_set=pa.array(forgotten, pa.string())).cast(pa.int64())).as_py() or 0
    return pa.table({"rows": [table.num_rows], "live": [live], "erased": [erased]})


def _settle(table: pa.Table, store: Store, recipe: str, forgotten: list[str]) -> pa.Table:
    rows = settle(store, table.select(MARKED.names), forgotten) if table.num_rows else []
    return pa.table({"part": pa.array([put_rows(store, recipe, rows) if rows else ""], pa.string())})
