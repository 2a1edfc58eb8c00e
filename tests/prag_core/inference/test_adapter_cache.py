"""The adapter cache is bounded, loads each adapter once, and never returns a wrong one, in memory or on the disk."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

from prag_core.errors import AdapterError
from prag_core.inference.adapter_cache import AdapterCache
from prag_core.inference.disk_cache import DiskCache
from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import flatten_adapter
from prag_core.recipe import RECIPES
from prag_core.store.adapters import LedgerSource
from tests.helpers.disk_filling import fill_disk
from tests.helpers.serving import PASSAGES, World

KEYS = [passage.key for passage in PASSAGES]


class Counting:
    """A ledger source that counts its reads, and can be made to fail or to wait."""

    def __init__(self, source: LedgerSource) -> None:
        self.source = source
        self.reads: list[str] = []
        self.fail = False
        self.let_go = threading.Event()
        self.let_go.set()
        self.recipe, self.layout = source.recipe, source.layout
        self.row, self.unpack = source.row, source.unpack

    def read(self, row):
        self.reads.append(row.key)
        assert self.let_go.wait(60)
        if self.fail:
            raise AdapterError(f"adapter {row.key}: gone")
        return self.source.read(row)


@pytest.fixture(scope="module")
def world(tiny_session: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tiny_session, tmp_path_factory.mktemp("world"))
    made.publish()
    return made


@pytest.fixture
def source(world: World) -> Counting:
    return Counting(world.open().source)


@pytest.fixture(scope="module")
def size_bytes(world: World) -> int:
    return world.open().source.row(KEYS[0]).length


def loaded(cache: AdapterCache, source: Counting, *keys: str):
    lease = cache.lease(source, keys)
    wait(lease.futures)
    return lease, lease.adapters(0.0)


def flat(source: Counting, key: str) -> torch.Tensor:
    return flatten_adapter(source.layout, source.source.get(key), dtype=torch.float32)


def test_adapters_in_use_are_kept_and_the_others_are_within_the_budget(source: Counting, size_bytes: int) -> None:
    rng = random.Random(0)
    cache = AdapterCache(5 * size_bytes, dtype=torch.float32, threads=3)
    held = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            held.pop(rng.randrange(len(held))).release()
        elif len(held) < 6:
            keys = rng.sample(KEYS[:20], rng.randint(1, 3))
            lease, factors = loaded(cache, source, *keys)
            held.append(lease)
            for key in keys:
                assert torch.equal(factors[key], flat(source, key))
        stats = cache.stats()
        assert stats.size_bytes <= max(5 * size_bytes, stats.pinned_bytes)
        assert stats.size_bytes == stats.entries * size_bytes
    for lease in held:
        lease.release()
        lease.release()
    stats = cache.stats()
    assert (stats.pinned_bytes, stats.entries) == (0, 5)
    assert stats.misses == len(source.reads) == stats.evictions + 5
    cache.close()


def test_adapters_are_kept_in_the_dtype_of_the_model(source: Counting, size_bytes: int) -> None:
    """They are stored in fp32, so in bf16 twice as many fit."""
    cache = AdapterCache(3 * size_bytes, dtype=torch.bfloat16)
    lease, adapters = loaded(cache, source, *KEYS[:6])
    lease.release()
    assert {adapter.dtype for adapter in adapters.values()} == {torch.bfloat16}
    stats = cache.stats()
    assert (stats.entries, stats.size_bytes) == (6, 3 * size_bytes)
    cache.close()


def test_an_adapter_that_many_need_is_read_once(source: Counting) -> None:
    cache = AdapterCache(10**9, dtype=torch.float32, threads=4)
    source.let_go.clear()
    with ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda _: cache.lease(source, KEYS[:2]), range(50)))
    source.let_go.set()
    for lease in leases:
        wait(lease.futures)
        assert not any(isinstance(factors, AdapterError) for factors in lease.adapters(0.0).values())
    assert sorted(source.reads) == sorted(KEYS[:2])
    assert cache.stats().hits == 98
    cache.close()


def test_a_released_lease_cancels_loads_that_have_not_started(source: Counting) -> None:
    """While the only thread is busy, a queued load that nobody needs any more is cancelled."""
    cache = AdapterCache(10**9, dtype=torch.float32, threads=1)
    source.let_go.clear()
    first, second, third = (cache.lease(source, [key]) for key in KEYS[:3])
    assert "was not loaded within 2 s" in str(second.adapters(2.0)[KEYS[1]])
    second.release()
    third.release()
    source.let_go.set()
    wait(first.futures)
    again, factors = loaded(cache, source, KEYS[2])
    assert source.reads == [KEYS[0], KEYS[2]]
    assert not isinstance(factors[KEYS[2]], AdapterError)
    for lease in (first, again):
        lease.release()
    assert cache.stats().pinned_bytes == 0
    cache.close()


def test_a_failure_is_remembered_for_a_while(source: Counting) -> None:
    now = [0.0]
    cache = AdapterCache(10**9, dtype=torch.float32, negative_ttl_s=10.0, clock=lambda: now[0])
    source.fail = True
    for _ in range(3):
        lease, factors = loaded(cache, source, KEYS[0])
        assert "gone" in str(factors[KEYS[0]])
        lease.release()
    assert len(source.reads) == 1
    source.fail = False
    now[0] = 11.0
    lease, factors = loaded(cache, source, KEYS[0])
    assert not isinstance(factors[KEYS[0]], AdapterError)
    assert (len(source.reads), cache.stats().failures) == (2, 1)
    cache.close()


def test_a_late_release_does_not_unpin_a_later_lease(source: Counting) -> None:
    now = [0.0]
    cache = AdapterCache(0, dtype=torch.float32, negative_ttl_s=1.0, clock=lambda: now[0])
    source.fail = True
    failed = cache.lease(source, KEYS[:1])
    wait(failed.futures)
    source.fail, now[0] = False, 2.0
    lease, _ = loaded(cache, source, KEYS[0])
    failed.release()
    assert cache.stats().entries == 1
    lease.release()
    assert cache.stats().entries == 0
    cache.close()


def test_a_key_that_the_snapshot_lacks_is_not_loaded(source: Counting) -> None:
    cache = AdapterCache(10**9, dtype=torch.float32)
    lease, factors = loaded(cache, source, "0" * 32, KEYS[0])
    assert "the snapshot has none" in str(factors["0" * 32])
    assert not isinstance(factors[KEYS[0]], AdapterError)
    assert source.reads == KEYS[:1]
    lease.release()
    cache.close()


def test_a_passage_trained_again_is_another_entry(tiny_session: BaseModel, tmp_path: Path) -> None:
    world = World(tiny_session, tmp_path)
    sources = [Counting(world.open(world.publish(shift, count=3).id).source) for shift in (0, 1)]
    sources.append(Counting(world.open(world.publish(1, RECIPES["paper"], count=3).id).source))
    cache = AdapterCache(10**9, dtype=torch.float32, disk=DiskCache(tmp_path / "disk", 10**9))
    for _ in range(2):
        for source in sources:
            lease, factors = loaded(cache, source, KEYS[0])
            assert torch.equal(factors[KEYS[0]], flat(source, KEYS[0]))
            lease.release()
    assert [len(source.reads) for source in sources] == [1, 1, 1]
    cache.close()


# --- the local disk ------------------------------------------------------------------------------------------------


def test_a_restart_reads_from_the_disk(source: Counting, tmp_path: Path) -> None:
    for _ in range(2):
        cache = AdapterCache(10**9, dtype=torch.float32, disk=DiskCache(tmp_path, 10**9))
        _, factors = loaded(cache, source, *KEYS[:4])
        assert not any(isinstance(f, AdapterError) for f in factors.values())
        cache.close()
    assert sorted(source.reads) == sorted(KEYS[:4])
    assert cache.stats().disk_hits == 4


def test_a_damaged_copy_is_fetched_again(source: Counting, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 10**9)
    row = source.row(KEYS[0])
    good = source.source.read(row)
    for damaged in (good[:-1], b"", bytes(len(good))):
        disk.put(source.recipe, row.checksum, damaged)
        cache = AdapterCache(10**9, dtype=torch.float32, disk=disk)
        _, factors = loaded(cache, source, KEYS[0])
        assert not isinstance(factors[KEYS[0]], AdapterError)
        assert disk.get(source.recipe, row.checksum) == good
        assert cache.stats().misses == 1
        cache.close()


def test_the_disk_keeps_the_most_recently_used_files_within_its_budget(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1000)
    for n in range(10):
        disk.put("g", f"old{n}", bytes(100))
        os.utime(tmp_path / "g" / f"old{n}", (n, n))
    (tmp_path / "g" / ".half.tmp").write_bytes(bytes(500))  # a killed process left it
    os.utime(tmp_path / "g" / ".half.tmp", (0, 0))
    assert disk.get("g", "old0") == bytes(100)
    disk.put("g", "new", bytes(100))
    kept = {path.name for path in (tmp_path / "g").iterdir()}
    assert {"old0", "new", "old9"} <= kept
    assert not kept & {"old1", ".half.tmp"}
    assert sum(path.stat().st_size for path in (tmp_path / "g").iterdir()) <= 1000
    disk.put("g", "larger than all", bytes(1001))
    assert disk.get("g", "larger than all") is None


def test_a_file_that_cannot_be_removed_is_left_and_the_others_are_trimmed(tmp_path: Path) -> None:
    (tmp_path / "g" / "a folder of somebody").mkdir(parents=True)
    os.utime(tmp_path / "g" / "a folder of somebody", (0, 0))
    size_bytes = (tmp_path / "g" / "a folder of somebody").stat().st_size
    disk = DiskCache(tmp_path, size_bytes + 500)
    for n in range(10):
        disk.put("g", f"{n}", bytes(100))
        os.utime(tmp_path / "g" / f"{n}", (n + 1, n + 1))
    assert disk.get("g", "9") == bytes(100)
    assert disk.get("g", "0") is None


def test_processes_share_a_disk(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill_disk, args=(str(tmp_path), seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    DiskCache(tmp_path, 20_000)
    assert sum(path.stat().st_size for path in (tmp_path / "g").iterdir()) <= 20_000


def test_a_disk_that_cannot_be_written_is_no_error(source: Counting, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 10**9)
    (tmp_path / source.recipe).write_text("a file where the folder should be")
    cache = AdapterCache(10**9, dtype=torch.float32, disk=disk)
    _, factors = loaded(cache, source, KEYS[0])
    assert not isinstance(factors[KEYS[0]], AdapterError)
    cache.close()


@pytest.mark.parametrize("broken", ["folder", "lock"])
def test_a_disk_that_cannot_be_trimmed_is_no_error(source: Counting, tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "disk"
    if broken == "folder":
        folder.write_text("a file where the folder should be")
    else:
        (folder / ".lock").mkdir(parents=True)
    cache = AdapterCache(
        10**9, dtype=torch.float32, disk=DiskCache(folder, source.row(KEYS[0]).length)
    )  # trimmed with each adapter
    _, factors = loaded(cache, source, *KEYS[:3])
    assert not any(isinstance(found, AdapterError) for found in factors.values())
    cache.close()
