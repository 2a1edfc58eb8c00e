"""Compaction and collection in one process, and a store that has something to compact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet

from prag_core.llm.layout import LoraLayout
from prag_core.maintenance.compaction import compact_shards, corpus_keys, mark_live, put_rows, record_compaction
from prag_core.maintenance.erasure import snapshots_to_keep
from prag_core.maintenance.garbage import collect, find_garbage
from prag_core.records import LedgerRow
from prag_core.store.ledger import Compaction
from prag_core.store.objects import Store
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.snapshot import (
    load_snapshot,
    publish,
    with_ledger,
)
from prag_core.store.tables import corpus_parts
from tests.helpers.stores import (
    RECIPE,
    SEEDS,
    VERSION,
    adapters_of,
    commit,
    run_again,
    snapshot_now,
)

KEYS = list(SEEDS)


def filled(store: Store, layout: LoraLayout) -> Store:
    """A store whose passages 0 to 7 were trained twice, and 0 to 4 a third time."""
    put_inputs(store, "run0", RunInputs(VERSION, RECIPE.fingerprint))
    run_again(store, layout)
    adapters = adapters_of(store, layout)
    commit(adapters, KEYS[:8], "new", seed=100)
    commit(adapters, KEYS[:5], "newer", seed=200)
    snapshot_now(store, adapters)
    return store


def seed_of(key: str) -> int:
    return 200 if key in KEYS[:5] else 100 if key in KEYS[:8] else 0


def mark_rows(store: Store, parts: Sequence[str], versions: set[str], since: float = math.inf) -> pa.Table:
    tables = [corpus_keys(store, part) for version in versions for part in corpus_parts(store, version)]
    rows = pa.concat_tables([store.get_table(LedgerRow, parts), *tables])
    return mark_live(rows, load_snapshot(store).tombstones, since)


def compact(store: Store, corpora: Sequence[str] = (), since: float = math.inf) -> None:
    """What `pipelines.maintenance.compact` does on Ray, in one process."""
    snapshot = load_snapshot(store)
    forgotten = snapshot.tombstones
    marked = mark_rows(store, snapshot.ledger_parts, {snapshot.corpus_version, *corpora}, since)
    rows = compact_shards(store, marked, forgotten)
    part = put_rows(store, snapshot.recipe, rows)
    record_compaction(store, snapshot.recipe, Compaction((part,), tuple({*snapshot.ledger_parts} - {part})))
    publish(store, with_ledger(snapshot, [part], len(rows)), replaces=snapshot.id)


def collect_all(store: Store, keep: int = 1) -> set[str]:
    before = {item.name for item in store.objects()}
    collect(store, find_garbage(store, store.objects(), snapshots_to_keep(store, keep)[0], grace_s=0))
    return before - {item.name for item in store.objects()}
