"""Compaction, and forgetting: readers see each adapter exactly once at every moment, and forgotten bytes go."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from prag_core.errors import AdapterError, InputError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import find_targets
from prag_core.maintenance.compaction import compact_shards, corpus_keys, mark_live, put_rows, record_compaction
from prag_core.maintenance.erasure import erase_rows, parts_holding, snapshots_to_keep
from prag_core.maintenance.garbage import collect, find_garbage, needed_corpora
from prag_core.maintenance.inventory import object_kind
from prag_core.maintenance.repair import repair
from prag_core.records import LedgerRow, Reject, from_table
from prag_core.store.adapters import AdapterStore, LedgerSource, find_row, open_adapters
from prag_core.store.ledger import Compaction, compactions, replaced_parts, visible_parts
from prag_core.store.objects import Store
from prag_core.store.pins import kept_snapshots, pin, unpin
from prag_core.store.runs import RunInputs, put_inputs
from prag_core.store.shards import keys_in
from prag_core.store.snapshot import (
    current_id,
    forgotten_keys,
    load_snapshot,
    publish,
    rollback,
    with_ledger,
    with_tombstones,
    without_tombstones,
)
from prag_core.store.tables import corpus_parts, find_passages, put_augmentations, put_rejects
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.s3 import S3Server
from tests.helpers.stores import (
    PASSAGES,
    RECIPE,
    SEEDS,
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

KEYS = list(SEEDS)


@pytest.fixture(scope="module")
def layout(tiny_session: BaseModel) -> LoraLayout:
    return find_targets(tiny_session.model, RECIPE.train)[0]


@pytest.fixture
def store(tmp_path: Path, layout: LoraLayout) -> Store:
    return filled(Store(str(tmp_path / "store")), layout)


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


def mark(store: Store, parts: Sequence[str], versions: set[str], since: float = math.inf) -> pa.Table:
    tables = [corpus_keys(store, part) for version in versions for part in corpus_parts(store, version)]
    rows = pa.concat_tables([store.get_table(LedgerRow, parts), *tables])
    return mark_live(rows, load_snapshot(store).tombstones, since)


def compact(store: Store, corpora: Sequence[str] = (), since: float = math.inf) -> None:
    """What the pipeline does on Ray, in one process."""
    snapshot = load_snapshot(store)
    forgotten = snapshot.tombstones
    marked = mark(store, snapshot.ledger_parts, {snapshot.corpus_version, *corpora}, since)
    rows = compact_shards(store, marked, forgotten)
    part = put_rows(store, snapshot.recipe, rows)
    record_compaction(store, snapshot.recipe, Compaction((part,), tuple({*snapshot.ledger_parts} - {part})))
    publish(store, with_ledger(snapshot, [part], len(rows)), replaces=snapshot.id)


def clean(store: Store, keep: int = 1) -> set[str]:
    before = {item.name for item in store.objects()}
    collect(store, find_garbage(store, store.objects(), snapshots_to_keep(store, keep)[0], grace_s=0))
    return before - {item.name for item in store.objects()}


def test_a_compaction_leaves_one_row_a_key_and_gc_takes_the_rest(store: Store, layout: LoraLayout) -> None:
    old = load_snapshot(store)
    assert len(old.ledger_parts) == 6
    compact(store)
    new = load_snapshot(store)
    (part,) = new.ledger_parts
    rows = from_table(LedgerRow, store.get_table(LedgerRow, [part]))
    assert [row.key for row in rows] == sorted(KEYS)
    assert visible_parts(store, RECIPE.fingerprint) == [part]
    # The shard of 8 with 3 live ones was written anew, the one of 5 stays, of the oldest only the untouched stay.
    assert {object_kind(name) for name in clean(store, keep=3)} == set()
    gone = clean(store)
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
    marked = mark(store, [part], {VERSION})
    assert put_rows(store, RECIPE.fingerprint, compact_shards(store, marked, ())) == part
    assert clean(store) == set()
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
        clean(store)
        look()
    assert looked[0] == 25
    assert looked[-1] == 12
    assert len(looked) > 12


@pytest.mark.parametrize("stop_at", range(6))
def test_a_compaction_that_was_killed_is_done_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
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
    clean(store)
    assert verify(store) == []
    assert len(store.list("adapters", ".parquet")) == 1
    assert len(served(store)) == len(KEYS)


def test_a_lost_part_of_a_compaction_brings_the_old_ones_back(store: Store) -> None:
    old = set(load_snapshot(store).ledger_parts)
    compact(store)
    (part,) = load_snapshot(store).ledger_parts
    assert replaced_parts(store, RECIPE.fingerprint, [*old, part]) == old
    store.remove(part)
    assert set(visible_parts(store, RECIPE.fingerprint)) == old


def test_a_second_compaction_replaces_what_the_first_had_replaced(store: Store, layout: LoraLayout) -> None:
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


def test_adapters_of_passages_that_no_needed_corpus_has_go(store: Store, layout: LoraLayout) -> None:
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
    clean(store)
    held = [keys_in(store, shard)[0] for shard in store.list("adapters", ".safetensors")]
    assert sorted(key for shard in held for key in shard) == sorted(KEYS[3:])
    assert verify(store) == []


@pytest.mark.slow
def test_checked_mended_compacted_and_collected_on_s3(s3_server: S3Server, layout: LoraLayout) -> None:
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
    assert {object_kind(name) for name in clean(store)} >= {"snapshots", "ledger", "shards"}
    assert verify(store) == []
    assert all(is_trained(layout, key, factors, seed_of(key)) for key, factors in served(store).items())
    assert len(served(store)) == len(KEYS)


# ---- forgetting


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
    clean(store, keep=5)  # snapshots that would be kept for their age go, for they hold it
    assert holders(store, victim) == {"snapshots"}  # its tombstone
    assert verify(store) == []
    found = served(store)
    assert set(found) == set(KEYS) - {victim}
    assert all(is_trained(layout, key, factors, seed_of(key)) for key, factors in found.items())
    rows = store.get_table(LedgerRow, store.list("adapters", ".parquet"))
    assert sorted(rows["key"].to_pylist()) == sorted(set(KEYS) - {victim})


def test_what_an_earlier_compaction_left_in_a_shard_is_found(store: Store, layout: LoraLayout) -> None:
    """A superseded adapter lies in a shard without any row: forgetting its passage must find it there."""
    adapters = adapters_of(store, layout)
    rows = commit(adapters, KEYS, "all", seed=500)
    commit(adapters, KEYS[:1], "last", seed=600)
    snapshot_now(store, adapters)
    compact(store)
    clean(store)
    shard = rows[0].shard
    assert KEYS[0] in keys_in(store, shard)[0]  # 11 of 12 count, so the shard was not written anew
    publish(store, with_tombstones(load_snapshot(store), [KEYS[0]]))
    rerun(store, layout, "v2", "2d")
    compact(store)
    clean(store)
    assert not store.exists(shard)
    assert "shards" not in holders(store, KEYS[0])
    assert set(served(store)) == set(KEYS[1:])


def test_a_pinned_snapshot_holds_what_was_forgotten_and_it_is_said(store: Store, layout: LoraLayout) -> None:
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
    clean(store, keep=5)
    assert load_snapshot(store, first.id) == first
    assert parts_holding(store, [first], [KEYS[1]]) == held
    unpin(store, first.id)
    clean(store, keep=5)
    assert "shards" not in holders(store, KEYS[1])


def test_what_was_forgotten_stays_so_in_any_snapshot(store: Store) -> None:
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


def test_passages_are_found_by_key_and_by_id(store: Store) -> None:
    known = find_passages(store, VERSION, ["p3", KEYS[5], "p3", "f" * 32])
    assert sorted((passage.key, passage.sources) for passage in known) == sorted(
        [(KEYS[3], ("p3",)), (KEYS[5], ("p5",))]
    )
    with pytest.raises(InputError, match="has no passage nobody"):
        find_passages(store, VERSION, ["p3", "nobody"])
    with pytest.raises(AdapterError, match="the snapshot has none"):
        find_row(store, load_snapshot(store).ledger_parts, "f" * 32)


def test_erasing_rows_keeps_the_others(store: Store) -> None:
    folder = f"augmentations/{RECIPE.augment.fingerprint}"
    stranger = make_passage(99)
    put_augmentations(store, RECIPE.augment.fingerprint, [make_augmentation(p) for p in (*PASSAGES[:3], stranger)])
    erase_rows(store, [KEYS[0], KEYS[1]])
    parts = store.list(folder, ".parquet")
    left = {key for part in parts for key in store.get_columns(part, ["key", "digest"])["key"].to_pylist()}
    assert left == {*KEYS[2:], stranger.key}
    assert verify(store) == []
