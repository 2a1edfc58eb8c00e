"""The contract of a store's backend: the same tests on a folder, in memory, on another file system, and on S3."""

from __future__ import annotations

import pickle
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prag_core.errors import ConflictError, DamagedError, StoreError
from prag_core.store.backend import Backend
from prag_core.store.backends import open_backend
from prag_core.store.objects import Store

S3 = pytest.param("s3", marks=pytest.mark.slow)
# A file system of fsspec's for which there is no backend of its own: a folder of another one.
OTHER = "dir::memory://{}"


def open_new(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    name = uuid.uuid4().hex
    if kind == "s3":
        return Store(f"s3://{request.getfixturevalue('s3_server').bucket}/{name}")
    return Store({"folder": str(tmp_path / "store"), "memory": f"memory://{name}", "other": OTHER.format(name)}[kind])


@pytest.fixture(params=["folder", "memory", "other", S3])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_new(request.param, request, tmp_path)


@pytest.fixture(params=["folder", "memory", S3])
def swapping(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store whose backend has a conditional write."""
    return open_new(request.param, request, tmp_path)


def backend_of(store: Store) -> Backend:
    return open_backend(store.url, store.options, store.retries, store.timeout_s)


def test_objects_and_ranges_come_back(store: Store) -> None:
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", 2, 5) == b"234"
    assert store.get("a/b.bin", 7) == b"789"
    assert store.exists("a/b.bin")
    assert store.exists("a")
    assert not store.exists("a/b")
    assert store.get_if_exists("a/b.bin") == b"0123456789"
    store.put("a/b.bin", b"shorter")
    assert store.get("a/b.bin") == b"shorter"


def test_a_missing_object_is_an_answer(store: Store) -> None:
    store.put("a/b.bin", b"0123456789")
    assert store.get_if_exists("a/none") is None
    assert store.size("a/none") is None
    assert store.size("a") is None  # a folder
    assert store.size("a/b.bin") == 10
    for read in (store.get, store.open):
        with pytest.raises(StoreError, match=r"a/none: no such object") as caught:
            read("a/none")
        assert type(caught.value) is DamagedError
    store.remove("a/none")
    store.remove("a/b.bin")
    assert not store.exists("a/b.bin")


@pytest.mark.parametrize("name", ["../private.txt", "a/../../private.txt", "..", "a\0b"])
def test_no_name_leads_out_of_the_store(store: Store, tmp_path: Path, name: str) -> None:
    """Names stand in documents of the store, too. Who may write one of them must not reach files beside the store."""
    store.put("a/b", b"b")
    (tmp_path / "private.txt").write_text("mine")
    for attempt in (
        lambda: store.get(name),
        lambda: store.get(name, 0, 1),
        lambda: store.size(name),
        lambda: store.exists(name),
        lambda: store.put(name, b"theirs"),
        lambda: store.remove(name),
        lambda: store.open(name),
    ):
        with pytest.raises(DamagedError, match="is no name of an object"):
            attempt()
    assert (tmp_path / "private.txt").read_text() == "mine"


@pytest.mark.parametrize(("start", "end"), [(8, 12), (10, 12), (20, 30)])
def test_a_range_beyond_the_end_is_an_error(store: Store, start: int, end: int) -> None:
    store.put("x", b"0123456789")
    with pytest.raises(StoreError, match=r"x: cannot be read: .*\n.*it was cut short") as caught:
        store.get("x", start, end)
    assert type(caught.value) is DamagedError


def test_a_file_becomes_an_object(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 1000)
    store.put_file("deep/er/x", source)
    with store.open("deep/er/x") as stream:
        stream.seek(1000)
        assert stream.read(100) == source.read_bytes()[1000:1100]
    assert store.get("deep/er/x") == source.read_bytes()


def test_a_list_keeps_to_its_folder(store: Store) -> None:
    assert store.list("doc1", ".bin") == []
    for name in ("doc1/a.bin", "doc1/deep/b.bin", "doc1/c.txt", "doc10/d.bin", "doc1.bin"):
        store.put(name, b"1")
    assert store.list("doc1", ".bin") == ["doc1/a.bin", "doc1/deep/b.bin"]


def test_objects_have_sizes_and_times(store: Store) -> None:
    store.put("b/c", b"123")
    store.put("a", b"1")
    found = store.objects()
    assert [(item.name, item.size_bytes) for item in found] == [("a", 1), ("b/c", 3)]
    assert all(abs(time.time() - item.modified) < 60 for item in found)


def test_reads_see_what_another_client_wrote(store: Store) -> None:
    store.put("doc/a.bin", b"1")
    store.put("doc/b.bin", b"1")
    assert store.list("doc", ".bin") == ["doc/a.bin", "doc/b.bin"]
    assert store.exists("doc/a.bin")
    other = Store(store.url, store.options, retries=store.retries + 1)  # on S3, another client with its own cache
    other.remove("doc/a.bin")
    other.put("doc/b.bin", b"longer than before")
    other.put("doc/c.bin", b"1")
    assert store.list("doc", ".bin") == ["doc/b.bin", "doc/c.bin"]
    assert not store.exists("doc/a.bin")
    assert store.size("doc/b.bin") == len(b"longer than before")
    assert store.get("doc/b.bin") == b"longer than before"


def test_a_store_pickles_as_its_url(store: Store) -> None:
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_the_check_for_writing_leaves_nothing_behind(swapping: Store) -> None:
    swapping.check_writable()
    assert swapping.list("", "") == []


def test_conditions_are_honoured_and_leave_the_object_as_it_was(swapping: Store) -> None:
    swapping.put("x", b"1")
    assert backend_of(swapping).honours_conditions("x")
    assert swapping.get("x") == b"1"


def test_a_file_system_without_a_conditional_write_says_so() -> None:
    store = Store(OTHER.format(uuid.uuid4().hex))
    for use in (store.check_writable, lambda: store.swap("x", None, b"1")):
        with pytest.raises(StoreError, match=r"has no conditional write\n.*use a folder or s3://"):
            use()
    assert store.list("", "") == []


def test_of_many_swaps_one_wins(swapping: Store) -> None:
    def claim(expected: bytes | None, new: str) -> bool:
        try:
            swapping.swap("deep/CURRENT", expected, new.encode())
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: claim(None, str(n)), range(8)))
        assert won.count(True) == 1
        current = swapping.get("deep/CURRENT")
        assert current == str(won.index(True)).encode()
        won = list(pool.map(lambda n: claim(current, f"then {n}"), range(8)))
    assert won.count(True) == 1
    assert swapping.get("deep/CURRENT") == f"then {won.index(True)}".encode()


def test_a_swap_that_comes_too_late_writes_nothing(swapping: Store) -> None:
    with pytest.raises(ConflictError, match="changed by somebody else"):
        swapping.swap("CURRENT", b"there is none", b"new")
    assert not swapping.exists("CURRENT")
    swapping.swap("CURRENT", None, b"first")
    for stale in (None, b"stale"):
        with pytest.raises(ConflictError, match="changed by somebody else"):
            swapping.swap("CURRENT", stale, b"late")
    assert swapping.get("CURRENT") == b"first"
    swapping.swap("CURRENT", b"first", b"second")
    assert swapping.get("CURRENT") == b"second"
