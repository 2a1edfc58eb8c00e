"""Garbage: what a kept snapshot or a recent run needs is never removed."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from prag_core.errors import ConflictError, LeaseError, StoreError
from prag_core.identity import checksum, fingerprint
from prag_core.llm.layout import LoraLayout
from prag_core.maintenance.erasure import erase_rows
from prag_core.maintenance.garbage import collect, find_garbage, recent_inputs
from prag_core.maintenance.inventory import object_kind
from prag_core.maintenance.repair import repair
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, Passage, Route, from_table
from prag_core.store.adapters import LedgerSource, open_adapters, put_start
from prag_core.store.objects import Store
from prag_core.store.pins import pin, pinned
from prag_core.store.runs import RunInputs, acquire_lease, put_inputs
from prag_core.store.shard_codec import pack_shard
from prag_core.store.snapshot import (
    answers_of,
    current_id,
    load_snapshot,
    publish,
    rollback,
    with_route,
    with_tombstones,
)
from tests.helpers.adapters import random_adapter
from tests.helpers.stores import (
    INDEX,
    PASSAGES,
    RECIPE,
    SEEDS,
    VERSION,
    adapters_of,
    all_snapshots,
    commit,
    served,
    snapshot_now,
    verify,
    write_corpus,
    write_index,
)


def age(store: Store, hours: float) -> None:
    for item in store.objects():
        os.utime(Path(store.url, item.name), (item.modified - 3600 * hours,) * 2)


def collect_objects(store: Store, kept: set[str], grace_s: float = 0.0) -> set[str]:
    before = {item.name for item in store.objects()}
    collect(store, find_garbage(store, store.objects(), kept, grace_s=grace_s))
    return before - {item.name for item in store.objects()}


def test_the_note_of_a_warmup_goes_with_its_start(store: Store, layout: LoraLayout) -> None:
    start = put_start(store, layout, random_adapter(layout, 1))
    recipe = Recipe("base", RECIPE.augment, replace(RECIPE.train, start=start))
    adapters_of(store, layout, recipe).describe()
    put_inputs(store, "run1", RunInputs(VERSION, recipe.fingerprint))
    other = put_start(store, layout, random_adapter(layout, 2))
    for name in (start, other):
        store.put_json(f"starts/{name}.json", {"warmup": name})
    assert verify(store) == []
    # No recipe names a reader or a writer: configurations do.
    for seed, task in enumerate(("reading", "asking"), start=3):
        named = put_start(store, layout, random_adapter(layout, seed))
        store.put_json(f"starts/{named}.json", {"warmup": named, "settings": {task: True}})
    assert collect_objects(store, all_snapshots(store)) == {f"starts/{other}.json", f"starts/{other}.safetensors"}


def test_a_store_in_use_has_no_garbage(store: Store) -> None:
    assert collect_objects(store, all_snapshots(store)) == set()


def test_orphans_are_removed_after_the_grace_period(store: Store, layout: LoraLayout) -> None:
    data, _ = pack_shard(layout, [("k", random_adapter(layout, 1))], "float32", {})
    orphan = f"adapters/{RECIPE.fingerprint}/shards/{checksum(data)}.safetensors"
    store.put(orphan, data)
    store.put("corpus/x/part-1.parquet.abc.tmp", b"cut")
    start = f"starts/{put_start(store, layout, random_adapter(layout, 2))}.safetensors"
    expected = {orphan, "corpus/x/part-1.parquet.abc.tmp", start}
    kept = all_snapshots(store)
    assert collect_objects(store, kept, grace_s=3600) == set()
    age(store, 2)
    assert collect_objects(store, kept, grace_s=3600) == expected
    assert verify(store) == []


def test_objects_that_only_an_old_snapshot_named_go_with_it(store: Store, layout: LoraLayout) -> None:
    old = current_id(store)
    write_corpus(store, "v2", PASSAGES[:6])
    write_index(store, "2d", "v2")
    other = Recipe("base", RECIPE.augment, replace(RECIPE.train, seed=9))
    adapters = adapters_of(store, layout, other)
    adapters.describe()
    commit(adapters, list(SEEDS))
    put_inputs(store, "run1", RunInputs("v2", other.fingerprint))
    new = snapshot_now(store, adapters, "v2", "2d")
    assert collect_objects(store, {str(old), new}) == set()
    gone = collect_objects(store, {new})
    assert {object_kind(name) for name in gone} == {"corpus", "indexes", "ledger", "recipes", "shards", "snapshots"}
    assert all(VERSION in n or INDEX in n.split("/") or RECIPE.fingerprint in n or str(old) in n for n in gone)
    assert verify(store) == []
    assert set(served(store)) == set(SEEDS)


def test_answers_of_an_evaluation_go_with_the_last_snapshot_that_gives_them(store: Store) -> None:
    old = load_snapshot(store)
    names = {}
    for name, snapshot in {"old": old, "forgotten": with_tombstones(old, [PASSAGES[0].key])}.items():
        store.put_json(f"evaluations/{name}/about.json", {"version": 3, "answers_of": answers_of(snapshot)})
        store.put(f"evaluations/{name}/replies/part-1.parquet", b"x")
        names[name] = {f"evaluations/{name}/about.json", f"evaluations/{name}/replies/part-1.parquet"}
    store.put("evaluations/verdicts/ab/part-1.parquet", b"x")
    store.put("evaluations/unknown/replies/part-1.parquet", b"x")
    other = with_route(old, Route(closed_below=1.5, prag_score=4.0, prag_next=0.3, otherwise="combine"))
    publish(store, other)
    assert collect_objects(store, {other.id}, grace_s=3600) == set()
    # Other thresholds give the same answers. One passage less does not: it may be named in an answer.
    gone = {name for name in collect_objects(store, {other.id}) if name.startswith("evaluations/")}
    assert gone == names["forgotten"] | {"evaluations/unknown/replies/part-1.parquet"}
    publish(store, with_tombstones(other, [PASSAGES[0].key]))
    gone = {name for name in collect_objects(store, {str(current_id(store))}) if name.startswith("evaluations/")}
    assert gone == names["old"]


def test_objects_of_recent_runs_and_kept_snapshots_stay(store: Store, layout: LoraLayout) -> None:
    write_corpus(store, "v2", PASSAGES[:6])
    adapters = adapters_of(store, layout, Recipe("base", RECIPE.augment, replace(RECIPE.train, seed=9)))
    adapters.describe()
    commit(adapters, list(SEEDS)[:3])
    put_inputs(store, "run1", RunInputs("v2", adapters.recipe.fingerprint))
    put_inputs(store, "run2", RunInputs(VERSION, RECIPE.fingerprint))
    kept = all_snapshots(store)
    # 1. A run that is not the newest has worked for hours, and is still there.
    age(store, 2)
    store.put_json("runs/run1/progress.json", {})
    assert collect_objects(store, kept, grace_s=3600) == set()
    # 2. It is not, but a kept snapshot has its recipe: also what that one does not name would be resumed from.
    serving = str(current_id(store))
    other = snapshot_now(store, adapters, "v2", INDEX)
    rollback(store, serving)
    commit(adapters, list(SEEDS)[3:6])
    age(store, 2)
    assert collect_objects(store, {*kept, other}, grace_s=3600) == set()
    # 3. Nobody needs it any more.
    gone = collect_objects(store, kept, grace_s=3600)
    assert {object_kind(name) for name in gone} == {"corpus", "ledger", "recipes", "shards", "snapshots"}
    assert verify(store) == []


def test_thresholds_of_auto_outlive_a_collection_and_a_repair(store: Store, layout: LoraLayout) -> None:
    old = load_snapshot(store)
    route = Route(closed_below=1.5, prag_score=4.0, prag_next=0.3, otherwise="combine")
    fitted = with_route(old, route)
    publish(store, fitted, replaces=old.id)
    age(store, 48)
    assert verify(store) == []
    assert collect_objects(store, {fitted.id}) == {f"snapshots/{old.id}.json"}
    assert load_snapshot(store) == fitted
    # Damaged shards are removed, and a run makes them again: with the thresholds that were in service.
    (part, *_) = fitted.ledger_parts
    shard = from_table(LedgerRow, store.get_table(LedgerRow, [part]))[0].shard
    store.put(shard, store.get(shard)[:-1])
    repair(store, verify(store))
    assert load_snapshot(store).route == route


def test_a_young_snapshot_keeps_the_objects_that_it_names(store: Store, layout: LoraLayout) -> None:
    first = str(current_id(store))
    write_corpus(store, "v2", PASSAGES[:6])
    write_index(store, "2d", "v2")
    age(store, 48)
    adapters = adapters_of(store, layout)
    snapshot_now(store, adapters, "v2", "2d")
    third = snapshot_now(store, adapters)
    assert collect_objects(store, {third}, grace_s=24 * 3600) == {f"snapshots/{first}.json"}
    assert verify(store) == []


@pytest.mark.parametrize("how", ["rollback", "rollback over a tombstone", "pin"])
def test_a_snapshot_that_is_chosen_during_a_collection_stays(store: Store, layout: LoraLayout, how: str) -> None:
    """Neither takes the lease that the collection holds: both must work while a run is at work."""
    adapters = adapters_of(store, layout)
    write_corpus(store, "v2", PASSAGES[:6])
    write_index(store, "2d", "v2")
    old = load_snapshot(store, snapshot_now(store, adapters, "v2", "2d"))
    commit(adapters, list(SEEDS)[:3], "new", seed=50)
    new = snapshot_now(store, adapters)
    if "tombstone" in how:
        publish(store, with_tombstones(load_snapshot(store), list(SEEDS)[:1]))
        new = str(current_id(store))
    before = contents(store, old.id)
    garbage = find_garbage(store, store.objects(), {new}, grace_s=0)
    assert {f"snapshots/{old.id}.json", "indexes/2d/index.json"} <= {finding.name for finding in garbage.objects}
    chosen = []

    def choose() -> None:  # when everything has been looked at, and the first object is about to be removed
        if not chosen:
            chosen.append(pin(store, old.id) if how == "pin" else rollback(store, old.id))

    with pytest.raises(ConflictError, match="run `prag gc` again"):
        collect(store, garbage, choose)
    assert contents(store, old.id) == before
    assert verify(store) == []
    collect_objects(store, {new, old.id} if how == "pin" else {str(current_id(store))})
    assert verify(store) == []
    assert len(served(store)) == len(PASSAGES)


@pytest.mark.parametrize("choose", [rollback, pin])
def test_a_snapshot_that_was_just_removed_cannot_be_chosen(
    store: Store, layout: LoraLayout, monkeypatch: pytest.MonkeyPatch, choose: Callable[[Store, str], object]
) -> None:
    old = str(current_id(store))
    write_index(store, "2d", VERSION)
    snapshot_now(store, adapters_of(store, layout), index="2d")
    new = with_tombstones(load_snapshot(store), list(SEEDS)[:1])
    publish(store, new)
    real, snapshots = Store.swap, all_snapshots(store)

    def swap(self: Store, name: str, expected: bytes | None, data: bytes) -> None:
        store.remove(f"snapshots/{old}.json")  # what a collection does between a look at it and the write
        real(self, name, expected, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "swap", swap)
        with pytest.raises(ConflictError, match="removing the snapshot"):
            choose(store, old)
    assert (current_id(store), pinned(store)) == (new.id, ())
    assert all_snapshots(store) == snapshots - {old}


def test_without_the_lease_nothing_more_is_removed(store: Store) -> None:
    store.put(f"adapters/{RECIPE.fingerprint}/shards/{'0' * 32}.safetensors", b"nobody's")
    garbage = find_garbage(store, store.objects(), all_snapshots(store), grace_s=0)
    row = from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))[0]
    store.put(row.shard, store.get(row.shard)[:-1])
    findings, before = verify(store), {item.name for item in store.objects()}
    lease = acquire_lease(store, "gc", ttl_s=0.2)
    acquire_lease(store, "run1", take_over=True).release()
    deadline = time.monotonic() + 10
    while not lease.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for work in (
        lambda: collect(store, garbage, lease.check),
        lambda: repair(store, findings, lease.check),
        lambda: erase_rows(store, [row.key], lease.check),
    ):
        with pytest.raises(LeaseError, match="the lease of run gc"):
            work()
    assert before <= {item.name for item in store.objects()}
    lease.release()


@pytest.mark.parametrize("seed", range(25))
def test_no_object_of_a_kept_snapshot_is_ever_removed(store: Store, layout: LoraLayout, seed: int) -> None:
    choice = random.Random(seed)
    recipes = [RECIPE, Recipe("base", RECIPE.augment, replace(RECIPE.train, seed=1))]
    # 1. A random history of runs, some of them published.
    for number in range(choice.randrange(2, 7)):
        adapters = adapters_of(store, layout, choice.choice(recipes))
        adapters.describe()
        version, index = choice.choice([("v1", "i1"), ("v2", "i2"), (VERSION, INDEX)])
        write_corpus(store, version, PASSAGES)
        write_index(store, index, version)
        put_inputs(store, f"run{number + 1}", RunInputs(version, adapters.recipe.fingerprint))
        for _ in range(choice.randrange(4)):
            keys = choice.sample(sorted(SEEDS), choice.randrange(1, 6))
            commit(adapters, keys, f"digest{number}", seed=choice.randrange(1000))
        if choice.random() < 0.6:
            snapshot_now(store, adapters, version, index)
    # 2. Keep some snapshots, and collect all that can go.
    kept = {id for id in all_snapshots(store) if choice.random() < 0.5}
    (inputs,) = recent_inputs(store, store.objects(), math.inf)
    before = {id: contents(store, id) for id in kept | {str(current_id(store))}}
    resumable = latest(store, inputs.recipe)
    collect_objects(store, kept)
    # 3. Each kept snapshot is as it was, to the bit; the newest run would find each of its adapters; nothing hangs.
    assert {id: contents(store, id) for id in before} == before
    assert latest(store, inputs.recipe) == resumable
    assert all_snapshots(store) == set(before)
    assert verify(store) == []
    # 4. What could go went: the shards left are those that a ledger part names.
    collect_objects(store, kept)
    rows = store.get_table(LedgerRow, store.list("adapters", ".parquet"), ["shard"])["shard"]
    assert set(store.list("adapters", ".safetensors")) == set(rows.unique().to_pylist())


def contents(store: Store, id: str) -> str:
    snapshot = load_snapshot(store, id)
    source = LedgerSource(open_adapters(store, snapshot.recipe)[0], snapshot.ledger_parts)
    adapters = {key: {n: t.tolist() for n, t in source.get(key).items()} for key in SEEDS if key in source}
    corpus = store.get_table(Passage, store.get_json(f"corpus/{snapshot.corpus_version}/manifest.json")["parts"])
    archive = checksum(store.get(f"indexes/{snapshot.index}/lucene.tar.zst"))
    return fingerprint([asdict(snapshot), adapters, corpus.to_pylist(), archive])


def latest(store: Store, recipe: str) -> dict[str, tuple[str, str]]:
    """Key → the digest and checksum of its latest adapter."""
    rows = from_table(LedgerRow, store.get_table(LedgerRow, store.list(f"adapters/{recipe}/ledger", ".parquet")))
    return {row.key: (row.augmentation, row.checksum) for row in sorted(rows, key=lambda row: row.created)}


def test_a_damaged_store_is_not_collected(store: Store, layout: LoraLayout) -> None:
    part = adapters_of(store, layout).ledger_parts()[0]
    store.put(part, store.get(part)[:-20])
    with pytest.raises(StoreError, match="then `prag repair`"):
        find_garbage(store, store.objects(), all_snapshots(store), grace_s=0)
