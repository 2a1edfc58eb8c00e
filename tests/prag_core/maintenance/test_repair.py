"""Verify and repair: damage is found, never used, and repaired."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from prag_core.errors import StoreError
from prag_core.identity import checksum
from prag_core.llm.layout import LoraLayout
from prag_core.maintenance.compaction import put_rows, record_compaction
from prag_core.maintenance.inventory import Finding, object_kind, serving_id
from prag_core.maintenance.repair import repair
from prag_core.records import LedgerRow, from_dict, from_table, to_table
from prag_core.store.adapters import AdapterStore
from prag_core.store.ledger import Compaction
from prag_core.store.objects import Store
from prag_core.store.pins import PINS, pin
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
from tests.helpers.adapters import random_adapter
from tests.helpers.stores import (
    INDEX,
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
    write_index,
)

UNNAMED = ("augmentations", "rejects", "compactions", "runs")


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory, layout: LoraLayout) -> Path:
    """A store with everything that a store may hold: int8 adapters, a compaction, a pinned older snapshot, a lease."""
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
    """Return whether two JSON documents differ in white space only."""
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
        # Nothing names these objects, so a check cannot notice that one is missing.
        names = [name for name in names if object_kind(name) not in UNNAMED and name != PINS]
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
        # A lease has no checksum: one that can still be parsed is not damage.
        while altered == data or same_document(name, data, altered) or (name == LEASE and is_lease(altered)):
            place = choice.randrange(len(data))
            altered = data[:place] + bytes([data[place] ^ choice.randrange(1, 256)]) + data[place + 1 :]
        store.put(name, altered)
    return [name]


@pytest.mark.parametrize("block", range(8))
def test_200_random_damages_are_found_never_used_and_repaired(
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
        # 3. Repaired: the rest can be served, and after a run everything is there again.
        acquire_lease(store, "repair", take_over=damaged == [LEASE]).release()
        repaired = repair(store, findings)
        assert repaired.serving == serving_id(store)
        run_again(store, layout)
        assert verify(store) == [], (seed, damaged)
        assert sum(is_sound(key, factors) for key, factors in served(store).items()) == len(PASSAGES)
        shutil.rmtree(folder)


def test_an_undamaged_store_has_no_findings(store: Store) -> None:
    assert verify(store) == []
    assert verify(store, full=False) == []


def test_good_adapters_beside_a_damaged_one_are_kept_unchanged(store: Store, layout: LoraLayout) -> None:
    snapshot = load_snapshot(store)
    rows = from_table(LedgerRow, store.get_table(LedgerRow, snapshot.ledger_parts))
    victim = rows[1]
    data = bytearray(store.get(victim.shard))
    data[victim.offset + 5] ^= 64
    store.put(victim.shard, bytes(data))
    (finding,) = verify(store)
    assert (finding.name, finding.kind, finding.keys) == (victim.shard, "checksum", (victim.key,))
    repaired = repair(store, [finding])
    assert repaired.dropped == (victim.key,)
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


def test_a_shard_with_extra_bytes_is_found_and_written_again(store: Store) -> None:
    shard = next(item.name for item in store.objects() if object_kind(item.name) == "shards")
    store.put(shard, store.get(shard) + b"more")
    findings = verify(store)
    assert [(finding.name, finding.kind, finding.keys) for finding in findings] == [(shard, "checksum", ())]
    assert repair(store, findings).dropped == ()
    assert verify(store) == []
    assert set(served(store)) == set(SEEDS)


def test_a_killed_repair_loses_nothing(
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


def test_a_fast_check_finds_missing_and_short_shards(store: Store) -> None:
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
def test_an_invalid_adapter_is_found(store: Store, layout: LoraLayout, kind: str, value: float | None) -> None:
    """Its checksum is right: a writer stored bytes that never were an adapter."""
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


def test_a_damaged_snapshot_in_service_is_replaced_by_the_newest_readable_one(store: Store, layout: LoraLayout) -> None:
    first = load_snapshot(store)
    write_index(store, "other", VERSION)
    second = snapshot_now(store, adapters_of(store, layout), index="other")
    store.put(f"snapshots/{second}.json", store.get(f"snapshots/{second}.json").replace(b"other", b"othor"))
    repaired = repair(store, verify(store))
    assert repaired.serving == first.id == current_id(store)
    assert verify(store) == []


def test_a_snapshot_out_of_service_that_lost_its_index_is_removed(store: Store, layout: LoraLayout) -> None:
    first = load_snapshot(store)
    write_index(store, "other", VERSION)
    second = snapshot_now(store, adapters_of(store, layout), index="other")
    store.put(f"indexes/{INDEX}/lucene.tar.zst", b"cut")
    repaired = repair(store, verify(store))
    assert repaired.snapshots == {first.id: ""}
    assert current_id(store) == second
    assert verify(store) == []


@pytest.mark.parametrize("whole", [True, False])
def test_damage_of_a_snapshot_undoes_no_forgetting(store: Store, layout: LoraLayout, whole: bool) -> None:
    """Not even if the only snapshot left is newer and lacks the tombstones, as that of a publisher that lost."""
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
    repaired = repair(store, verify(store))
    assert repaired.serving == current_id(store)
    assert load_snapshot(store).tombstones == (keys[0],)
    assert load_snapshot(store).index == "other"
    # 3. Nor a run after CURRENT was lost.
    store.remove("CURRENT")
    assert forgotten_now(store) == {keys[0]}


def test_a_repair_does_not_remove_an_object_that_appeared_since_the_check(store: Store) -> None:
    """A rollback under a check's eyes puts a snapshot into service that the check had not seen."""
    snapshot = load_snapshot(store)
    document = f"snapshots/{snapshot.id}.json"
    findings = [Finding("CURRENT", "not_readable"), Finding(document, "missing", repairable=False)]
    assert repair(store, findings).removed == ()
    assert load_snapshot(store) == snapshot
    shard = next(item.name for item in store.objects() if object_kind(item.name) == "shards")
    store.remove(shard)
    repaired = repair(store, verify(store))
    assert shard not in repaired.removed
    assert len(repaired.dropped) == 3


def test_safetensors_reads_a_shard_of_moved_adapters(store: Store) -> None:
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


@pytest.mark.parametrize("named", ["../private.txt", f"corpus/{VERSION}/manifest.json"])
def test_a_ledger_part_has_no_say_about_other_objects(tmp_path: Path, layout: LoraLayout, named: str) -> None:
    """Whoever may write ledger parts alone must not get anything else removed: they name shards of their recipe."""
    store = Store(str(tmp_path / "store"))
    run_again(store, layout)
    (tmp_path / "private.txt").write_text("mine")
    before = [item.name for item in store.objects()]
    (part, *_) = adapters_of(store, layout).ledger_parts()
    rows = from_table(LedgerRow, store.get_table(LedgerRow, [part]))
    forged = put_rows(store, RECIPE.fingerprint, [replace(row, shard=named, length=10**6) for row in rows])
    found = verify(store)
    assert [(finding.name, finding.kind) for finding in found] == [(forged, "not_readable")]
    assert named in found[0].detail
    assert repair(store, found).removed == (forged,)
    assert (tmp_path / "private.txt").read_text() == "mine"
    assert [item.name for item in store.objects()] == before
