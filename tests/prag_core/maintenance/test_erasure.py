"""Forgetting: no byte of a forgotten passage stays, and it stays forgotten in every snapshot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from prag_core.llm.layout import LoraLayout
from prag_core.maintenance.erasure import erase_rows, parts_holding, snapshots_to_keep
from prag_core.maintenance.inventory import object_kind
from prag_core.records import LedgerRow, Reject
from prag_core.store.objects import Store
from prag_core.store.pins import pin, unpin
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.shards import keys_in
from prag_core.store.snapshot import (
    current_id,
    forgotten_keys,
    load_snapshot,
    publish,
    rollback,
    with_tombstones,
    without_tombstones,
)
from prag_core.store.tables import put_augmentations, put_rejects
from tests.helpers.compaction import KEYS, collect_all, compact, filled, seed_of
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.stores import (
    PASSAGES,
    RECIPE,
    adapters_of,
    commit,
    is_trained,
    served,
    snapshot_now,
    verify,
    write_corpus,
    write_index,
)


@pytest.fixture
def store(tmp_path: Path, layout: LoraLayout) -> Store:
    return filled(Store(str(tmp_path / "store")), layout)


def rerun(store: Store, layout: LoraLayout, version: str, index: str) -> None:
    """What a run does after something was forgotten: a corpus and an index without it, and a snapshot of them."""
    snapshot = load_snapshot(store)
    write_corpus(store, version, [p for p in PASSAGES if p.key not in snapshot.tombstones])
    write_index(store, index, version)
    put_inputs(store, f"run1-{version}", RunInputs(version, RECIPE.fingerprint))
    publish(store, with_tombstones(replace(snapshot, corpus_version=version, index=index), []), replaces=snapshot.id)


def holders(store: Store, key: str) -> set[str]:
    """The kinds of objects that still have anything of a passage, by looking into each byte of each."""
    found = set()
    for item in store.objects():
        data = store.get(item.name)
        if item.name.endswith(".parquet"):
            with pa.BufferReader(data) as stream:
                data = str(pa.parquet.read_table(stream).to_pylist()).encode()
        if key.encode() in data:
            found.add(object_kind(item.name))
    return found


def test_no_byte_of_a_forgotten_passage_stays(store: Store, layout: LoraLayout) -> None:
    victim = KEYS[1]
    put_rejects(store, "run0", [Reject("train", "loss_not_finite", "", "p1", victim)])
    assert holders(store, victim) == {"corpus", "ledger", "shards", "augmentations", "rejects"}
    publish(store, with_tombstones(load_snapshot(store), [victim]))
    rerun(store, layout, "v2", "2d")
    compact(store)
    assert len(erase_rows(store, [victim])) == 2
    assert victim not in served(store)
    collect_all(store, keep=5)  # snapshots that would be kept for their age go, for they hold it
    assert holders(store, victim) == {"snapshots"}  # its tombstone
    assert verify(store) == []
    found = served(store)
    assert set(found) == set(KEYS) - {victim}
    assert all(is_trained(layout, key, factors, seed_of(key)) for key, factors in found.items())
    rows = store.get_table(LedgerRow, store.list("adapters", ".parquet"))
    assert sorted(rows["key"].to_pylist()) == sorted(set(KEYS) - {victim})


def test_a_forgotten_adapter_that_no_row_names_any_more_is_erased_too(store: Store, layout: LoraLayout) -> None:
    """A superseded adapter lies in a shard without any row: forgetting its passage must find it there."""
    adapters = adapters_of(store, layout)
    rows = commit(adapters, KEYS, "all", seed=500)
    commit(adapters, KEYS[:1], "last", seed=600)
    snapshot_now(store, adapters)
    compact(store)
    collect_all(store)
    shard = rows[0].shard
    assert KEYS[0] in keys_in(store, shard)[0]  # 11 of 12 count, so the shard was not written anew
    publish(store, with_tombstones(load_snapshot(store), [KEYS[0]]))
    rerun(store, layout, "v2", "2d")
    compact(store)
    collect_all(store)
    assert not store.exists(shard)
    assert "shards" not in holders(store, KEYS[0])
    assert set(served(store)) == set(KEYS[1:])


def test_a_pinned_snapshot_that_holds_forgotten_passages_is_reported(store: Store, layout: LoraLayout) -> None:
    first = load_snapshot(store)
    pin(store, first.id)
    publish(store, with_tombstones(first, [KEYS[1]]))
    kept, held = snapshots_to_keep(store, 5)
    serving = str(current_id(store))
    assert set(held) == {first.id, serving}  # also the one in service, until a run has made another corpus
    rerun(store, layout, "v2", "2d")
    compact(store)
    kept, held = snapshots_to_keep(store, 5)
    assert set(held) == {first.id}
    assert set(kept) == {first.id, str(current_id(store))}
    collect_all(store, keep=5)
    assert load_snapshot(store, first.id) == first
    assert parts_holding(store, [first], [KEYS[1]]) == held
    unpin(store, first.id)
    collect_all(store, keep=5)
    assert "shards" not in holders(store, KEYS[1])


def test_forgotten_passages_stay_forgotten_in_every_snapshot(store: Store) -> None:
    first = load_snapshot(store)
    publish(store, with_tombstones(first, [KEYS[3]]))
    assert forgotten_keys(store, first) == (KEYS[3],)
    back = rollback(store, first.id)
    assert back.id != first.id
    assert (back.tombstones, back.ledger_parts) == ((KEYS[3],), first.ledger_parts)
    assert load_snapshot(store) == back
    publish(store, without_tombstones(back, [KEYS[3]]))
    assert rollback(store, first.id) == first
    assert forgotten_keys(store, first) == ()


def test_erasing_rows_keeps_the_others(store: Store) -> None:
    folder = f"augmentations/{RECIPE.augment.fingerprint}"
    stranger = make_passage(99)
    put_augmentations(store, RECIPE.augment.fingerprint, [make_augmentation(p) for p in (*PASSAGES[:3], stranger)])
    erase_rows(store, [KEYS[0], KEYS[1]])
    parts = store.list(folder, ".parquet")
    left = {key for part in parts for key in store.get_columns(part, ["key", "digest"])["key"].to_pylist()}
    assert left == {*KEYS[2:], stranger.key}
    assert verify(store) == []
