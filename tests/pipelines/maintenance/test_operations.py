"""Damage is found, never used, and mended; what a kept snapshot names is never collected."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelines.cli.options import parse_age
from prag_core.errors import ConflictError, LeaseError, StoreError
from prag_core.identity import checksum, fingerprint, is_intact, seal
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import find_targets
from prag_core.maintenance.compaction import put_rows, record_compaction
from prag_core.maintenance.erasure import erase_rows
from prag_core.maintenance.garbage import collect, find_garbage, recent_inputs
from prag_core.maintenance.inventory import Finding, count_usage, object_kind, serving_id
from prag_core.maintenance.repair import repair
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, Passage, Reject, from_dict, from_table, to_table
from prag_core.store.adapters import AdapterStore, LedgerSource, open_adapters, put_start
from prag_core.store.ledger import Compaction
from prag_core.store.objects import Store
from prag_core.store.pins import PINS, pin, pinned
from prag_core.store.runs import LEASE, LeaseRecord, RunInputs, acquire_lease, put_inputs
from prag_core.store.shard_codec import pack_shard
from prag_core.store.shards import move_adapters
from prag_core.store.snapshot import (
    current_id,
    forgotten_keys,
    forgotten_now,
    load_snapshot,
    publish,
    put_snapshot,
    rollback,
    with_id,
    with_tombstones,
)
from prag_core.store.tables import clear_rejects, put_rejects
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
    is_trained,
    run_again,
    served,
    snapshot_now,
    verify,
    write_corpus,
    write_index,
)

NOBODY_NAMES = ("augmentations", "rejects", "compactions", "runs")


@pytest.fixture(scope="module")
def layout(tiny_session: BaseModel) -> LoraLayout:
    return find_targets(tiny_session.model, RECIPE.train)[0]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, layout: LoraLayout) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "store"
    store = Store(str(folder))
    put_inputs(store, "run0", RunInputs(VERSION, RECIPE.fingerprint))
    run_again(store, layout)
    return folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Store:
    shutil.copytree(pristine, tmp_path / "store")
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory, layout: LoraLayout) -> Path:
    """A store with all that a store may hold: int8 adapters, a compaction, a pinned older snapshot, a lease."""
    folder = tmp_path_factory.mktemp("worn") / "store"
    store = Store(str(folder))
    put_inputs(store, "run0", RunInputs(VERSION, RECIPE.fingerprint))
    commit(AdapterStore(store, RECIPE, layout, "int8"), list(SEEDS)[9:])
    adapters = adapters_of(store, layout)
    rows = commit(adapters, list(SEEDS)[:3])
    whole = put_rows(store, RECIPE.fingerprint, rows)
    halves = [put_rows(store, RECIPE.fingerprint, half) for half in (rows[:1], rows[1:])]
    store.remove(whole)
    run_again(store, layout)
    pin(store, str(current_id(store)))
    assert whole == put_rows(store, RECIPE.fingerprint, rows)
    record_compaction(store, RECIPE.fingerprint, Compaction((whole,), tuple(halves)))
    snapshot_now(store, adapters)
    acquire_lease(store, "run0").release()
    return folder


def same_document(name: str, before: bytes, after: bytes) -> bool:
    """JSON may be spaced otherwise and say the same."""
    try:
        return (name.endswith(".json") or name == "CURRENT") and json.loads(before) == json.loads(after)
    except ValueError:
        return False


def is_lease(data: bytes) -> bool:
    try:
        from_dict(LeaseRecord, json.loads(data))
    except (ValueError, TypeError):
        return False
    return True


def damage(store: Store, seed: int) -> list[str]:
    """Do one random damage to one object (two for a swap) and return its name."""
    choice = random.Random(seed)
    names = [item.name for item in store.objects()]
    how = choice.choice(["flip", "flip", "cut", "remove", "swap"])
    if how == "swap":
        kind = choice.choice(["shards", "ledger"])
        first, second = choice.sample([name for name in names if object_kind(name) == kind], 2)
        one, other = store.get(first), store.get(second)
        store.put(first, other)
        store.put(second, one)
        return [first, second]
    if how == "remove":
        # Nothing names these: the next run finds their passages without an augmentation, or not given up.
        names = [name for name in names if object_kind(name) not in NOBODY_NAMES and name != PINS]
    # Every kind of object as often as any other.
    kind = choice.choice(sorted({object_kind(name) for name in names}))
    name = choice.choice([name for name in names if object_kind(name) == kind])
    data = store.get(name)
    if how == "remove":
        store.remove(name)
    elif how == "cut":
        store.put(name, data[: choice.randrange(len(data))])
    else:
        altered = data
        # A lease that still reads as one says who holds the store, wrongly; it is a courtesy without a checksum.
        while altered == data or same_document(name, data, altered) or (name == LEASE and is_lease(altered)):
            place = choice.randrange(len(data))
            altered = data[:place] + bytes([data[place] ^ choice.randrange(1, 256)]) + data[place + 1 :]
        store.put(name, altered)
    return [name]


@pytest.mark.parametrize("block", range(8))
def test_200_random_damages_are_found_never_used_and_mended(
    worn: Path, tmp_path: Path, layout: LoraLayout, block: int
) -> None:
    good = served(Store(str(worn)))
    assert len(good) == len(PASSAGES)

    def is_sound(key: str, factors: dict[str, torch.Tensor]) -> bool:
        return is_trained(layout, key, factors) or all(torch.equal(factors[n], good[key][n]) for n in factors)

    for seed in range(25 * block, 25 * block + 25):
        folder = tmp_path / str(seed)
        shutil.copytree(worn, folder)
        store = Store(str(folder))
        damaged = damage(store, seed)
        # 1. Found, by name (a document that cannot be read hides what it names).
        findings = verify(store)
        assert set(damaged) <= {finding.name for finding in findings}, (seed, damaged, findings)
        # 2. Never used: the engine gets what was trained, or nothing, or an error that says so.
        try:
            assert all(is_sound(key, factors) for key, factors in served(store).items()), (seed, damaged)
        except (StoreError, TypeError, KeyError, ValueError):
            assert object_kind(damaged[0]) in ("ledger", "recipes", "snapshots"), (seed, damaged)
        # 3. Mended: what is left can be served, and after a run everything is there again.
        acquire_lease(store, "repair", take_over=damaged == [LEASE]).release()
        mended = repair(store, findings)
        assert mended.serving == serving_id(store)
        run_again(store, layout)
        assert verify(store) == [], (seed, damaged)
        assert sum(is_sound(key, factors) for key, factors in served(store).items()) == len(PASSAGES)
        shutil.rmtree(folder)


def test_an_undamaged_store_has_no_findings(store: Store) -> None:
    assert verify(store) == []
    assert verify(store, full=False) == []


def test_good_neighbours_of_a_damaged_adapter_are_kept_as_they_are(store: Store, layout: LoraLayout) -> None:
    snapshot = load_snapshot(store)
    rows = from_table(LedgerRow, store.get_table(LedgerRow, snapshot.ledger_parts))
    victim = rows[1]
    data = bytearray(store.get(victim.shard))
    data[victim.offset + 5] ^= 64
    store.put(victim.shard, bytes(data))
    (finding,) = verify(store)
    assert (finding.name, finding.kind, finding.keys) == (victim.shard, "checksum", (victim.key,))
    mended = repair(store, [finding])
    assert mended.dropped == (victim.key,)
    assert verify(store) == []
    # Readers of the snapshot in service have all the others at once; this passage goes into their prompt.
    assert set(served(store)) == set(SEEDS) - {victim.key}
    assert all(is_trained(layout, key, factors) for key, factors in served(store).items())
    assert load_snapshot(store).adapters == len(PASSAGES) - 1
    assert not store.exists(f"snapshots/{snapshot.id}.json")
    # Their training history moved along.
    left = {
        row.key: row for row in from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))
    }
    assert all(replace(left[row.key], shard=row.shard, offset=row.offset) == row for row in rows if row.key in left)


def test_bytes_too_many_are_found_and_a_whole_shard_comes_out(store: Store) -> None:
    shard = next(item.name for item in store.objects() if object_kind(item.name) == "shards")
    store.put(shard, store.get(shard) + b"more")
    findings = verify(store)
    assert [(finding.name, finding.kind, finding.keys) for finding in findings] == [(shard, "checksum", ())]
    assert repair(store, findings).dropped == ()
    assert verify(store) == []
    assert set(served(store)) == set(SEEDS)


def test_a_repair_that_is_killed_loses_nothing(
    pristine: Path, tmp_path: Path, layout: LoraLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before each write or removal in turn: every good adapter is still named, and a second repair finishes."""

    class KilledError(BaseException):
        pass

    for stop_at in range(100):
        folder = tmp_path / str(stop_at)
        shutil.copytree(pristine, folder)
        store = Store(str(folder))
        rows = from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))
        data = bytearray(store.get(rows[0].shard))
        data[rows[0].offset] ^= 1
        store.put(rows[0].shard, bytes(data))
        left = stop_at

        def step(*_: object, **__: object) -> None:
            nonlocal left
            if left == 0:
                raise KilledError
            left -= 1

        def stopping(real: Callable[..., object]) -> Callable[..., object]:
            return lambda *a, **k: (step(), real(*a, **k))[1]

        findings = verify(store)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "put", stopping(Store.put))
            patch.setattr(Store, "remove", stopping(Store.remove))
            try:
                repair(store, findings)
                finished = True
            except KilledError:
                finished = False
        good = set(SEEDS) - {rows[0].key}
        assert good <= set(served(store)), stop_at
        repair(store, verify(store))
        assert verify(store) == []
        assert set(served(store)) == good
        if finished:
            assert stop_at >= 4  # shard, ledger part, snapshot, CURRENT at least
            return
    raise AssertionError("it never finished")


def test_a_fast_check_finds_what_is_missing_or_cut_short(store: Store) -> None:
    shards = [item.name for item in store.objects() if object_kind(item.name) == "shards"]
    store.remove(shards[0])
    data = store.get(shards[1])
    store.put(shards[1], data[:-10])
    flipped = bytearray(store.get(shards[2]))
    flipped[-1] ^= 1
    store.put(shards[2], bytes(flipped))
    found = {finding.name: finding for finding in verify(store, full=False)}
    assert {name: finding.kind for name, finding in found.items()} == {shards[0]: "missing", shards[1]: "size"}
    assert len(found[shards[0]].keys) == 3
    assert len(found[shards[1]].keys) == 1


@pytest.mark.parametrize(("kind", "value"), [("not_finite", float("nan")), ("shape", None)])
def test_what_was_committed_wrongly_is_found(store: Store, layout: LoraLayout, kind: str, value: float | None) -> None:
    """Checksums agree here: a writer stored an adapter that never was one."""
    adapters = adapters_of(store, layout)
    factors = random_adapter(layout, 1)
    first = next(iter(factors))
    wrong = replace(layout, shapes=tuple((a, b + 1) for a, b in layout.shapes)) if value is None else layout
    data, (placed,) = pack_shard(
        wrong, [("bad", random_adapter(wrong, 1) if value is None else factors)], "float32", {}
    )
    if value is not None:
        plain = bytearray(data)
        end = placed.offset + factors[first].nbytes
        plain[end - 4 : end] = torch.tensor([value]).numpy().tobytes()
        data = bytes(plain)
    shard = f"{adapters.folder}/shards/{checksum(data)}.safetensors"
    sum_ = checksum(data[placed.offset : placed.offset + placed.length])
    row = from_table(LedgerRow, store.get_table(LedgerRow, adapters.ledger_parts()))[0]
    row = replace(row, key="bad", shard=shard, offset=placed.offset, length=placed.length, checksum=sum_)
    store.put(shard, data)
    store.put_table(f"{adapters.folder}/ledger", to_table(LedgerRow, [row]))
    (finding,) = verify(store)
    assert (finding.name, finding.kind, finding.keys) == (shard, kind, ("bad",))
    repair(store, [finding])
    assert verify(store) == []


def test_a_broken_snapshot_in_service_gives_way_to_the_newest_readable_one(store: Store, layout: LoraLayout) -> None:
    first = load_snapshot(store)
    write_index(store, "other", VERSION)
    second = snapshot_now(store, adapters_of(store, layout), index="other")
    store.put(f"snapshots/{second}.json", store.get(f"snapshots/{second}.json").replace(b"other", b"othor"))
    mended = repair(store, verify(store))
    assert mended.serving == first.id == current_id(store)
    assert verify(store) == []


def test_another_snapshot_that_lost_its_index_is_withdrawn(store: Store, layout: LoraLayout) -> None:
    first = load_snapshot(store)
    write_index(store, "other", VERSION)
    second = snapshot_now(store, adapters_of(store, layout), index="other")
    store.put(f"indexes/{INDEX}/lucene.tar.zst", b"cut")
    mended = repair(store, verify(store))
    assert mended.snapshots == {first.id: ""}
    assert current_id(store) == second
    assert verify(store) == []


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_forgotten_outlives_the_snapshot_that_said_so(store: Store, layout: LoraLayout, whole: bool) -> None:
    """Also when a newer snapshot knows nothing of it, as a publisher that lost leaves one, and is all that is left."""
    keys = sorted(SEEDS)[:3]
    first = load_snapshot(store)
    once = with_tombstones(first, keys[:1])
    publish(store, once)
    write_index(store, "other", VERSION)
    lost = with_id(replace(with_tombstones(first, []), index="other"))
    put_snapshot(store, lost)
    last = with_tombstones(once, keys[1:2])
    publish(store, last)
    # 1. Somebody takes a passage off the list: this is damage, and an operator's way out does not bring it back.
    store.put_json(f"snapshots/{last.id}.json", {**store.get_json(f"snapshots/{last.id}.json"), "tombstones": []})
    assert forgotten_now(store) == {keys[0]} == {*forgotten_keys(store, first)}
    before = store.get("CURRENT")
    back = rollback(store, first.id)
    assert back.tombstones == (keys[0],)
    store.put("CURRENT", before)
    store.remove(f"snapshots/{back.id}.json")
    # 2. Nor does a repair, whichever snapshots lost more than that.
    if not whole:
        store.put(f"indexes/{INDEX}/lucene.tar.zst", b"cut")
        store.put("indexes/other/lucene.tar.zst", b"cut")
    mended = repair(store, verify(store))
    assert mended.serving == current_id(store)
    assert load_snapshot(store).tombstones == (keys[0],)
    assert load_snapshot(store).index == "other"
    # 3. Nor a run after CURRENT was lost.
    store.remove("CURRENT")
    assert forgotten_now(store) == {keys[0]}


def test_a_repair_does_not_remove_what_was_missing_and_is_there(store: Store) -> None:
    """A rollback under a check's eyes puts a snapshot into service that the check had not seen."""
    snapshot = load_snapshot(store)
    document = f"snapshots/{snapshot.id}.json"
    findings = [Finding("CURRENT", "not_readable"), Finding(document, "missing", repairable=False)]
    assert repair(store, findings).removed == ()
    assert load_snapshot(store) == snapshot
    shard = next(item.name for item in store.objects() if object_kind(item.name) == "shards")
    store.remove(shard)
    mended = repair(store, verify(store))
    assert shard not in mended.removed
    assert len(mended.dropped) == 3


def test_a_note_of_a_warmup_is_no_damage_and_stays_with_its_start(store: Store, layout: LoraLayout) -> None:
    start = put_start(store, layout, random_adapter(layout, 1))
    recipe = Recipe("base", RECIPE.augment, replace(RECIPE.train, start=start))
    adapters_of(store, layout, recipe).describe()
    put_inputs(store, "run1", RunInputs(VERSION, recipe.fingerprint))
    other = put_start(store, layout, random_adapter(layout, 2))
    for name in (start, other):
        store.put_json(f"starts/{name}.json", {"warmup": name})
    assert verify(store) == []
    # No recipe names a reader: configurations do.
    reader = put_start(store, layout, random_adapter(layout, 3))
    store.put_json(f"starts/{reader}.json", {"warmup": reader, "settings": {"reading": True}})
    assert take(store, all_snapshots(store)) == {f"starts/{other}.json", f"starts/{other}.safetensors"}


def test_moved_adapters_are_a_shard_that_safetensors_reads(store: Store) -> None:
    rows = from_table(LedgerRow, store.get_table(LedgerRow, load_snapshot(store).ledger_parts))
    shard = rows[0].shard
    chosen = [row for row in rows if row.shard == shard][1:]
    moved = move_adapters(store, shard, chosen)
    old, new = (safetensors.torch.load(store.get(name)) for name in (shard, moved[0].shard))
    assert {name.split("/")[0] for name in new} == {row.key for row in chosen}
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert [store.get(m.shard, m.offset, m.offset + m.length) for m in moved] == [
        store.get(r.shard, r.offset, r.offset + r.length) for r in sorted(chosen, key=lambda row: row.offset)
    ]


# ---- collecting garbage


def age(store: Store, hours: float) -> None:
    for item in store.objects():
        os.utime(Path(store.url, item.name), (item.modified - 3600 * hours,) * 2)


def take(store: Store, kept: set[str], grace_s: float = 0.0) -> set[str]:
    before = {item.name for item in store.objects()}
    collect(store, find_garbage(store, store.objects(), kept, grace_s=grace_s))
    return before - {item.name for item in store.objects()}


def test_a_store_in_use_has_no_garbage(store: Store) -> None:
    assert take(store, all_snapshots(store)) == set()


def test_orphans_go_after_the_grace_period(store: Store, layout: LoraLayout) -> None:
    data, _ = pack_shard(layout, [("k", random_adapter(layout, 1))], "float32", {})
    orphan = f"adapters/{RECIPE.fingerprint}/shards/{checksum(data)}.safetensors"
    store.put(orphan, data)
    store.put("corpus/x/part-1.parquet.abc.tmp", b"cut")
    start = f"starts/{put_start(store, layout, random_adapter(layout, 2))}.safetensors"
    expected = {orphan, "corpus/x/part-1.parquet.abc.tmp", start}
    kept = all_snapshots(store)
    assert take(store, kept, grace_s=3600) == set()
    age(store, 2)
    assert take(store, kept, grace_s=3600) == expected
    assert verify(store) == []


def test_what_only_a_dropped_snapshot_named_goes_with_it(store: Store, layout: LoraLayout) -> None:
    old = current_id(store)
    write_corpus(store, "v2", PASSAGES[:6])
    write_index(store, "2d", "v2")
    other = Recipe("base", RECIPE.augment, replace(RECIPE.train, seed=9))
    adapters = adapters_of(store, layout, other)
    adapters.describe()
    commit(adapters, list(SEEDS))
    put_inputs(store, "run1", RunInputs("v2", other.fingerprint))
    new = snapshot_now(store, adapters, "v2", "2d")
    assert take(store, {str(old), new}) == set()
    gone = take(store, {new})
    assert {object_kind(name) for name in gone} == {"corpus", "indexes", "ledger", "recipes", "shards", "snapshots"}
    assert all(VERSION in n or INDEX in n.split("/") or RECIPE.fingerprint in n or str(old) in n for n in gone)
    assert verify(store) == []
    assert set(served(store)) == set(SEEDS)


def test_what_recent_runs_and_kept_snapshots_work_with_stays(store: Store, layout: LoraLayout) -> None:
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
    assert take(store, kept, grace_s=3600) == set()
    # 2. It is not, but a kept snapshot has its recipe: also what that one does not name would be resumed from.
    serving = str(current_id(store))
    other = snapshot_now(store, adapters, "v2", INDEX)
    rollback(store, serving)
    commit(adapters, list(SEEDS)[3:6])
    age(store, 2)
    assert take(store, {*kept, other}, grace_s=3600) == set()
    # 3. Nobody needs it any more.
    gone = take(store, kept, grace_s=3600)
    assert {object_kind(name) for name in gone} == {"corpus", "ledger", "recipes", "shards", "snapshots"}
    assert verify(store) == []


def test_a_snapshot_that_is_young_keeps_what_it_names(store: Store, layout: LoraLayout) -> None:
    first = str(current_id(store))
    write_corpus(store, "v2", PASSAGES[:6])
    write_index(store, "2d", "v2")
    age(store, 48)
    adapters = adapters_of(store, layout)
    snapshot_now(store, adapters, "v2", "2d")
    third = snapshot_now(store, adapters)
    assert take(store, {third}, grace_s=24 * 3600) == {f"snapshots/{first}.json"}
    assert verify(store) == []


@pytest.mark.parametrize("how", ["rollback", "rollback over a tombstone", "pin"])
def test_a_snapshot_that_is_chosen_while_it_is_collected_stays(store: Store, layout: LoraLayout, how: str) -> None:
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
    take(store, {new, old.id} if how == "pin" else {str(current_id(store))})
    assert verify(store) == []
    assert len(served(store)) == len(PASSAGES)


@pytest.mark.parametrize("choose", [rollback, pin])
def test_a_snapshot_that_was_just_collected_is_not_chosen(
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


def test_who_lost_the_lease_removes_nothing_more(store: Store) -> None:
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
def test_gc_never_takes_what_a_kept_snapshot_names(store: Store, layout: LoraLayout, seed: int) -> None:
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
    take(store, kept)
    # 3. Each kept snapshot is as it was, to the bit; the newest run would find each of its adapters; nothing hangs.
    assert {id: contents(store, id) for id in before} == before
    assert latest(store, inputs.recipe) == resumable
    assert all_snapshots(store) == set(before)
    assert verify(store) == []
    # 4. What could go went: the shards left are those that a ledger part names.
    take(store, kept)
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


def test_gc_refuses_a_store_it_cannot_read(store: Store, layout: LoraLayout) -> None:
    part = adapters_of(store, layout).ledger_parts()[0]
    store.put(part, store.get(part)[:-20])
    with pytest.raises(StoreError, match="run `prag repair` first"):
        find_garbage(store, store.objects(), all_snapshots(store), grace_s=0)


# ---- the small ones


def test_usage_counts_every_byte(store: Store) -> None:
    objects = store.objects()
    counted = count_usage(store, objects, 7)
    on_disk = sum(
        path.stat().st_size for path in Path(store.url).rglob("*") if path.suffix != ".lock" and path.is_file()
    )
    assert sum(counted.size_bytes.values()) == on_disk
    assert counted.adapters == len(PASSAGES)
    assert counted.objects["shards"] == 4
    shards = sum(item.size_bytes for item in objects if object_kind(item.name) in ("shards", "ledger"))
    assert counted.bytes_per_adapter == shards / len(PASSAGES)


def test_rejects_are_forgotten_by_stage_and_reason(store: Store) -> None:
    def reasons() -> list[str]:
        rows = from_table(Reject, store.get_table(Reject, store.list("rejects", ".parquet")))
        return sorted(f"{row.stage}/{row.reason}/{row.key}" for row in rows)

    rows = [Reject("augment", reason, "", f"p{n}", f"k{n}") for n, reason in enumerate(["no_pairs", "other"])]
    put_rejects(store, "run1", [*rows, Reject("train", "loss_not_finite", "", "p7", "k7")])
    put_rejects(store, "run2", rows)  # the same again, by another run
    assert clear_rejects(store, "augment", "nothing like it") == 0
    assert clear_rejects(store, "train", "no_pairs") == 0
    assert clear_rejects(store, "augment", "no_pairs") == 2  # k0, and k99 of the first run
    assert set(reasons()) == {"augment/other/k1", "train/loss_not_finite/k7"}
    assert verify(store) == []
    assert clear_rejects(store, None, None) == 2
    assert reasons() == []


def test_a_seal_shows_any_change() -> None:
    document = json.loads(json.dumps(seal({"a": [1, 2.5], "b": {"c": None}})))
    assert is_intact(document)
    assert not is_intact({**document, "a": [1, 2.25]})
    assert not is_intact({**document, "d": 1})
    assert is_intact({"a": 1})  # made before there were seals


def test_ages() -> None:
    assert [parse_age(text) for text in ("30s", "90m", "24h", "1.5d")] == [30, 5400, 86_400, 129_600]
    for text in ("", "24", "h", "1w", "-3h"):
        with pytest.raises(ValueError, match="is not an age"):
            parse_age(text)
