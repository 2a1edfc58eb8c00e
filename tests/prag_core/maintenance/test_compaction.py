"""Compaction: readers see each adapter exactly once at every moment."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prag_core.llm.layout import LoraLayout
from prag_core.maintenance.compaction import compact_shards, put_rows
from prag_core.maintenance.garbage import needed_corpora
from prag_core.maintenance.inventory import object_kind
from prag_core.maintenance.repair import repair
from prag_core.records import LedgerRow, from_table
from prag_core.store.adapters import AdapterStore, LedgerSource, find_row, open_adapters
from prag_core.store.ledger import compactions, replaced_parts, visible_parts
from prag_core.store.objects import Store
from prag_core.store.pins import kept_snapshots
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.shards import keys_in
from prag_core.store.snapshot import (
    load_snapshot,
    publish,
    with_ledger,
)
from tests.helpers.compaction import KEYS, collect_all, compact, filled, mark_rows, seed_of
from tests.helpers.s3 import S3Server
from tests.helpers.stores import (
    PASSAGES,
    RECIPE,
    VERSION,
    adapters_of,
    commit,
    is_trained,
    run_again,
    served,
    snapshot_now,
    verify,
    write_corpus,
    write_index,
)


@pytest.fixture
def store(tmp_path: Path, layout: LoraLayout) -> Store:
    return filled(Store(str(tmp_path / "store")), layout)


def test_a_compaction_leaves_one_row_for_each_key_and_gc_removes_the_rest(store: Store, layout: LoraLayout) -> None:
    old = load_snapshot(store)
    assert len(old.ledger_parts) == 6
    compact(store)
    new = load_snapshot(store)
    (part,) = new.ledger_parts
    rows = from_table(LedgerRow, store.get_table(LedgerRow, [part]))
    assert [row.key for row in rows] == sorted(KEYS)
    assert visible_parts(store, RECIPE.fingerprint) == [part]
    # The shard of 8 with 3 live ones was written anew, the one of 5 stays, of the oldest only the untouched stay.
    assert {object_kind(name) for name in collect_all(store, keep=3)} == set()
    gone = collect_all(store)
    assert {object_kind(name) for name in gone} == {"snapshots", "ledger", "compactions", "shards"}
    assert set(old.ledger_parts) <= gone
    assert store.list("adapters", ".parquet") == [part]
    assert compactions(store, RECIPE.fingerprint) == {}
    held = [keys_in(store, shard)[0] for shard in store.list("adapters", ".safetensors")]
    assert sorted(key for keys in held for key in keys) == sorted(KEYS)
    assert verify(store) == []
    found = served(store)
    assert set(found) == set(KEYS)
    assert all(is_trained(layout, key, factors, seed_of(key)) for key, factors in found.items())
    # There is nothing left to compact or to collect, and the next run finds everything done.
    before = {item.name for item in store.objects()}
    marked = mark_rows(store, [part], {VERSION})
    assert put_rows(store, RECIPE.fingerprint, compact_shards(store, marked, ())) == part
    assert collect_all(store) == set()
    assert {item.name for item in store.objects()} == before


def test_readers_see_each_adapter_once_at_every_moment(
    store: Store, layout: LoraLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look before each write and removal of a compaction and of the collection after it."""
    looked = []

    def look() -> None:
        adapters = open_adapters(store, RECIPE.fingerprint)[0]
        # 1. Who serves: the snapshot in service.
        source = LedgerSource(adapters, load_snapshot(store).ledger_parts)
        assert all(is_trained(layout, key, source.get(key), seed_of(key)) for key in KEYS)
        # 2. Who runs: the parts that count now.
        table = store.get_table(LedgerRow, adapters.ledger_parts())
        newest = {row.key: row for row in sorted(from_table(LedgerRow, table), key=lambda row: row.created)}
        rows = list(newest.values())
        assert sorted(row.key for row in rows) == sorted(KEYS)
        assert all(is_trained(layout, row.key, adapters.fetch(row), seed_of(row.key)) for row in rows)
        looked.append(len(table))

    def looking(real: Callable[..., object]) -> Callable[..., object]:
        return lambda *a, **k: (look(), real(*a, **k))[1]

    with monkeypatch.context() as patch:
        for name in ("put", "swap", "remove"):
            patch.setattr(Store, name, looking(getattr(Store, name)))
        compact(store)
        look()
        collect_all(store)
        look()
    assert looked[0] == 25
    assert looked[-1] == 12
    assert len(looked) > 12


@pytest.mark.parametrize("stop_at", range(6))
def test_a_killed_compaction_can_be_repeated(store: Store, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    class KilledError(BaseException):
        pass

    left = stop_at

    def stopping(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("put", "swap"):
            patch.setattr(Store, name, stopping(getattr(Store, name)))
        with pytest.raises(KilledError):
            compact(store)
    assert verify(store) == []
    assert len(served(store)) == len(KEYS)
    compact(store)
    collect_all(store)
    assert verify(store) == []
    assert len(store.list("adapters", ".parquet")) == 1
    assert len(served(store)) == len(KEYS)


def test_old_parts_count_again_if_a_part_of_the_compaction_is_lost(store: Store) -> None:
    old = set(load_snapshot(store).ledger_parts)
    compact(store)
    (part,) = load_snapshot(store).ledger_parts
    assert replaced_parts(store, RECIPE.fingerprint, [*old, part]) == old
    store.remove(part)
    assert set(visible_parts(store, RECIPE.fingerprint)) == old


def test_a_second_compaction_also_replaces_the_parts_that_the_first_replaced(store: Store, layout: LoraLayout) -> None:
    old = set(load_snapshot(store).ledger_parts)
    compact(store)
    first = load_snapshot(store).ledger_parts
    adapters = adapters_of(store, layout)
    commit(adapters, KEYS[:2], "newest", seed=300)
    snapshot_now(store, adapters)
    compact(store)
    second = load_snapshot(store).ledger_parts
    # Without the first one's part and record, its old parts must not count again.
    store.remove(first[0])
    assert visible_parts(store, RECIPE.fingerprint) == list(second)
    assert old < {*store.list("adapters", ".parquet")}


def test_a_damaged_shard_is_left_for_repair(store: Store) -> None:
    row = next(
        row
        for row in from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))
        if row.augmentation == "new" and row.key == KEYS[6]
    )
    data = bytearray(store.get(row.shard))
    data[row.offset] ^= 1
    store.put(row.shard, bytes(data))
    compact(store)
    assert [finding.name for finding in verify(store)] == [row.shard]
    assert set(served(store)) == set(KEYS) - {row.key}


def test_int8_adapters_move_bit_by_bit(store: Store, layout: LoraLayout) -> None:
    adapters = AdapterStore(store, RECIPE, layout, "int8")
    rows = commit(adapters, KEYS[:3], "int8", seed=300)
    before = {row.key: adapters.fetch(row) for row in rows}
    commit(adapters_of(store, layout), KEYS[:2], "newest", seed=400)
    snapshot_now(store, adapters)
    compact(store)
    moved = find_row(store, load_snapshot(store).ledger_parts, KEYS[2])
    assert (moved.dtype, moved.shard != rows[0].shard) == ("int8", True)
    factors = adapters.fetch(moved)
    assert all(torch.equal(factors[name], before[KEYS[2]][name]) for name in factors)
    assert verify(store) == []


def test_adapters_of_passages_that_left_every_needed_corpus_are_removed(store: Store, layout: LoraLayout) -> None:
    """A passage that changed is another one: no later row ever supersedes the adapter of the old text."""
    first = load_snapshot(store)
    write_corpus(store, "v2", PASSAGES[3:])
    write_index(store, "2d", "v2")
    put_inputs(store, "run1", RunInputs("v2", RECIPE.fingerprint))
    publish(store, with_ledger(replace(first, corpus_version="v2", index="2d"), first.ledger_parts, 9))

    def corpora(keep: int, grace_s: float = 0) -> list[str]:
        return needed_corpora(store, store.objects(), kept_snapshots(store, keep), grace_s=grace_s)

    def keys() -> set[str]:
        return {*store.get_table(LedgerRow, load_snapshot(store).ledger_parts, ["key"])["key"].to_pylist()}

    # 1. They stay while a kept snapshot has the passage, while a recent run works on it, and while they are young.
    assert corpora(keep=2) == corpora(keep=1, grace_s=3600) == sorted([VERSION, "v2"])
    compact(store, corpora(keep=2))
    assert keys() == {*KEYS}
    compact(store, since=0)
    assert keys() == {*KEYS}
    # 2. Then they go, and their bytes with them.
    assert corpora(keep=1) == ["v2"]
    compact(store, corpora(keep=1))
    assert keys() == {*KEYS[3:]} == {*served(store)}
    collect_all(store)
    held = [keys_in(store, shard)[0] for shard in store.list("adapters", ".safetensors")]
    assert sorted(key for shard in held for key in shard) == sorted(KEYS[3:])
    assert verify(store) == []


@pytest.mark.slow
def test_verify_repair_compact_and_collect_on_s3(s3_server: S3Server, layout: LoraLayout) -> None:
    store = filled(Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"), layout)
    assert verify(store) == verify(store, full=False) == []
    rows = {
        row.shard: row for row in from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))
    }
    flipped, cut, gone = sorted(row.shard for row in rows.values() if row.augmentation == "d")[:3]
    data = store.get(flipped)
    store.put(flipped, data[:-1] + bytes([data[-1] ^ 1]))
    store.put(cut, store.get(cut)[:-1])
    store.remove(gone)
    findings = verify(store)
    assert {finding.name: finding.kind for finding in findings} == {flipped: "checksum", cut: "size", gone: "missing"}
    repair(store, findings)
    assert verify(store) == []
    run_again(store, layout)
    compact(store)
    assert {object_kind(name) for name in collect_all(store)} >= {"snapshots", "ledger", "shards"}
    assert verify(store) == []
    assert all(is_trained(layout, key, factors, seed_of(key)) for key, factors in served(store).items())
    assert len(served(store)) == len(KEYS)
