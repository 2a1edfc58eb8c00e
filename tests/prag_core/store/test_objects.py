"""The store: whole objects, conditional writes, adapters that come back bit by bit or not at all."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

from prag_core.config import AugmentConfig, TrainConfig, augment_recipe, train_recipe
from prag_core.errors import AdapterError, ConflictError, StoreError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import adapter_size_bytes
from prag_core.llm.lora import Injector, TrainedAdapter, find_targets, stack_rows
from prag_core.llm.peft import export_peft
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, Passage, to_table
from prag_core.store.adapters import AdapterStore, LedgerSource, open_adapters
from prag_core.store.objects import Store
from tests.helpers.adapters import random_adapter
from tests.helpers.passages import make_passage

RECIPE = Recipe("base", augment_recipe(AugmentConfig(), "generator"), train_recipe(TrainConfig()))
KEY = "0c" * 16


@pytest.fixture
def adapters(store: Store, tiny_session: BaseModel) -> AdapterStore:
    layout, _ = find_targets(tiny_session.model, RECIPE.train)
    made = AdapterStore(store, RECIPE, layout, "float32")
    made.describe()
    return made


def trained(adapters: AdapterStore, key: str, seed: int) -> TrainedAdapter:
    return TrainedAdapter(key, random_adapter(adapters.layout, seed), 20, 500, 3.0, 0.5, 1.5)


def test_objects_come_back_and_ranges_too(store: Store) -> None:
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", 2, 5) == b"234"
    assert store.get("a/b.bin", 7) == b"789"
    assert store.exists("a/b.bin")
    assert store.exists("a")
    assert not store.exists("a/b")
    assert store.get_if_exists("a/b.bin") == b"0123456789"
    assert store.get_if_exists("a/none") is None
    with pytest.raises(StoreError, match=r"a/none: no such object"):
        store.get("a/none")


@pytest.mark.parametrize(("start", "end"), [(8, 12), (10, 12), (20, 30)])
def test_a_range_beyond_the_end_is_no_data(store: Store, start: int, end: int) -> None:
    store.put("x", b"0123456789")
    with pytest.raises(StoreError, match=r"x: cannot be read: .*\n.*it was cut short"):
        store.get("x", start, end)


def test_a_list_keeps_to_its_folder(store: Store) -> None:
    assert store.list("doc1", ".bin") == []
    for name in ("doc1/a.bin", "doc1/deep/b.bin", "doc1/c.txt", "doc10/d.bin", "doc1.bin"):
        store.put(name, b"1")
    assert store.list("doc1", ".bin") == ["doc1/a.bin", "doc1/deep/b.bin"]


def test_nothing_is_stale_when_another_writes(store: Store) -> None:
    store.put("doc/a.bin", b"1")
    store.put("doc/b.bin", b"1")
    assert store.list("doc", ".bin") == ["doc/a.bin", "doc/b.bin"]
    assert store.exists("doc/a.bin")

    other = Store(store.url, store.options, retries=store.retries + 1)
    assert store.is_local or other.fs is not store.fs  # else the two would share what they cache
    other.remove("doc/a.bin")
    other.put("doc/b.bin", b"longer than before")
    other.put("doc/c.bin", b"1")
    assert store.list("doc", ".bin") == ["doc/b.bin", "doc/c.bin"]
    assert not store.exists("doc/a.bin")
    assert store.fs.size(store.path("doc/b.bin")) == len(b"longer than before")
    assert store.get("doc/b.bin") == b"longer than before"


def test_a_store_that_can_be_written_says_nothing_and_stays_empty(store: Store) -> None:
    store.check_writable()
    assert store.list("", "") == []


def test_a_store_pickles_as_its_url(store: Store) -> None:
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_the_same_table_is_one_part(store: Store) -> None:
    table = to_table(Passage, [make_passage(n) for n in range(5)])
    assert store.put_table("corpus/v", table) == store.put_table("corpus/v", table)
    assert store.get_table(Passage, store.list("corpus", ".parquet")).equals(table)
    store.put("corpus/v/part-x.parquet", b"PAR1 but not really")
    with pytest.raises(StoreError, match=r"part-x\.parquet: not a readable Parquet part"):
        store.get_table(Passage, store.list("corpus", ".parquet"))


@pytest.mark.parametrize("whole_part_bytes", [1 << 20, 0])
def test_altered_columns_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_part_bytes: int) -> None:
    """Read whole, the name is the checksum; by ranges, as a big part is, each page has one of its own."""
    monkeypatch.setattr("prag_core.store.objects.WHOLE_PART_BYTES", whole_part_bytes)
    store, dice = Store(str(tmp_path / "store")), random.Random(4)
    table = pa.table({"key": [f"{dice.getrandbits(128):032x}" for _ in range(500)], "value": list(range(500))})
    part = store.put_table("parts", table)
    data = store.get(part)
    chunk = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    # A page's own header, some tens of bytes before it, is not under its checksum.
    for place in dice.sample(range(chunk.dictionary_page_offset + 100, chunk.data_page_offset), 100):
        store.put(part, data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"altered or cut short|not a readable Parquet part"):
            store.get_columns(part, ["key"])
    store.put(part, data)
    assert store.get_columns(part, ["key"]).equals(table.select(["key"]))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(StoreError, match=r"a/b: cannot be written: disk full"):
        store.put("a/b", b"data")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_object_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a name must not stand over no bytes; nor may a commit be there without what it names."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(opened: int) -> None:
        fsync(opened)
        done.append(f"sync {Path(f'/proc/self/fd/{opened}').readlink().relative_to(tmp_path)}")

    def record_replace(self: Path, target: str) -> Path:
        done.append(f"name {Path(target).relative_to(tmp_path)}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    store = Store(str(tmp_path / "store"))
    (tmp_path / "source").write_bytes(b"1")
    for write in (
        lambda: store.put("a/b", b"1"),
        lambda: store.put_file("a/b", tmp_path / "source"),
        lambda: store.swap("a/b", b"1", b"2"),
    ):
        done.clear()
        write()
        *folders, synced, named, after = done
        assert folders in ([], ["sync store", "sync ."])  # those in which a folder was made for it
        assert synced.startswith("sync store/a/b.")
        assert (named, after) == ("name store/a/b", "sync store/a")
    assert store.get("a/b") == b"2"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"store = '.*file/store': cannot be written"):
        Store(str(tmp_path / "file" / "store")).check_writable()
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket/x")


def test_of_many_swaps_one_wins(store: Store) -> None:
    def claim(expected: bytes | None, new: str) -> bool:
        try:
            store.swap("deep/CURRENT", expected, new.encode())
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: claim(None, str(n)), range(8)))
        assert won.count(True) == 1
        current = store.get("deep/CURRENT")
        assert current == str(won.index(True)).encode()
        won = list(pool.map(lambda n: claim(current, f"then {n}"), range(8)))
    assert won.count(True) == 1
    assert store.get("deep/CURRENT") == f"then {won.index(True)}".encode()


def test_a_swap_that_comes_too_late_writes_nothing(store: Store) -> None:
    with pytest.raises(ConflictError, match="changed by somebody else"):
        store.swap("CURRENT", b"there is none", b"new")
    assert not store.exists("CURRENT")
    store.swap("CURRENT", None, b"first")
    for stale in (None, b"stale"):
        with pytest.raises(ConflictError, match="changed by somebody else"):
            store.swap("CURRENT", stale, b"late")
    assert store.get("CURRENT") == b"first"
    store.swap("CURRENT", b"first", b"second")
    assert store.get("CURRENT") == b"second"


def test_a_part_is_read_without_a_dataset(tmp_path: Path) -> None:
    """Its threads may still hold the part's bytes when the process ends, and then they abort it, now and then."""
    store = Store(str(tmp_path))
    part = store.put_table("t", pa.table({"key": ["a"], "text": ["b"]}))
    code = f"""
import sys
from prag_core.store.objects import Store
store = Store({store.url!r})
assert store.get_part({part!r}).num_rows == store.get_columns({part!r}, ["key"]).num_rows == 1
print("pyarrow.dataset" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://key:sec/ret@bucket", "http://me:secret@host/x"])
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(StoreError, match="holds credentials") as caught:
        Store(url)
    assert "sec" not in str(caught.value).replace("section", "")


def test_adapters_come_back_bit_by_bit(adapters: AdapterStore) -> None:
    made = [trained(adapters, f"{n:032x}", n) for n in range(4)]
    rows = adapters.commit([(adapter, f"digest{n}") for n, adapter in enumerate(made)])
    reopened, train = open_adapters(adapters.store, RECIPE.fingerprint)
    assert train == RECIPE.train
    assert reopened.layout == adapters.layout
    source = LedgerSource(reopened, adapters.ledger_parts())
    for row, adapter in zip(rows, made, strict=True):
        got = source.get(row.key)
        assert all(torch.equal(got[name], adapter.factors[name]) for name in got)
    assert len({row.shard for row in rows}) == 1
    with pytest.raises(AdapterError, match="the snapshot has none"):
        source.get("unknown")


def test_each_row_is_read_as_it_was_stored(adapters: AdapterStore) -> None:
    made = trained(adapters, KEY, 1)
    assert made.factors is not None
    for dtype in ("int8", "bfloat16", "float32"):
        (row,) = AdapterStore(adapters.store, RECIPE, adapters.layout, dtype).commit([(made, "d")])
        got = adapters.fetch(row)
        assert row.dtype == dtype
        assert row.length == adapter_size_bytes(adapters.layout, dtype)
        assert all(torch.allclose(got[name].float(), made.factors[name], rtol=0.01, atol=0.02) for name in got)


def test_a_later_row_replaces_an_earlier_one(adapters: AdapterStore) -> None:
    adapters.commit([(trained(adapters, KEY, 1), "old")])
    adapters.commit([(trained(adapters, KEY, 2), "new")])
    got = LedgerSource(adapters, adapters.ledger_parts()).get(KEY)
    assert torch.equal(got["up_proj.A"], random_adapter(adapters.layout, 2)["up_proj.A"])


def test_a_shard_without_a_ledger_part_does_not_exist(adapters: AdapterStore) -> None:
    adapters.commit([(trained(adapters, KEY, 1), "d")])
    for part in adapters.ledger_parts():
        adapters.store.remove(part)
    assert KEY not in LedgerSource(adapters, adapters.ledger_parts())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_bytes_are_never_an_adapter(adapters: AdapterStore, damage: str) -> None:
    (row,) = adapters.commit([(trained(adapters, KEY, 1), "d")])
    data = bytearray(adapters.store.get(row.shard))
    if damage == "flip":
        data[row.offset + row.length // 2] ^= 1
    adapters.store.put(row.shard, bytes(data[: row.offset + row.length - 1] if damage == "cut" else data))
    if damage == "remove":
        adapters.store.remove(row.shard)
    with pytest.raises(AdapterError, match=f"adapter {KEY}"):
        LedgerSource(adapters, adapters.ledger_parts()).get(KEY)


def test_an_exported_adapter_is_the_same_to_peft(adapters: AdapterStore, tiny: BaseModel, tmp_path: Path) -> None:
    factors = random_adapter(adapters.layout, 3)
    export_peft(adapters.layout, factors, tmp_path / "peft", "base")
    ids = torch.arange(3, 20)[None]
    injector = Injector(tiny.model, RECIPE.train)
    with torch.no_grad(), injector.active(stack_rows(adapters.layout, [[(factors, 1.0)]], dtype=torch.float32)):
        ours = tiny.model(input_ids=ids).logits
    injector.close()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny.model, tmp_path / "peft")(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_ledger_rows_name_what_they_hold(adapters: AdapterStore) -> None:
    (row,) = adapters.commit([(trained(adapters, KEY, 1), "digest")])
    table = adapters.store.get_table(LedgerRow, adapters.ledger_parts())
    assert table.column("augmentation").to_pylist() == ["digest"]
    assert row.length == adapters.layout.parameters * 4
    assert row.recipe == RECIPE.fingerprint
    with pytest.raises(AdapterError, match="not finite"):
        adapters.commit(
            [
                (
                    TrainedAdapter(
                        "bad", {k: v / 0 for k, v in random_adapter(adapters.layout, 1).items()}, 1, 1, 1.0, 1.0, 1.0
                    ),
                    "d",
                )
            ]
        )
