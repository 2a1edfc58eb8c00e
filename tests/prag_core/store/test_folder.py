"""A folder as a store: durable before it returns, nothing left after a failure, and no lock among the objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prag_core.errors import StoreError, UnreachableError
from prag_core.store.objects import Store


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


def test_lock_files_are_not_objects(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.swap("CURRENT", None, b"1")
    (tmp_path / "store" / "CURRENT.lock").touch()  # earlier versions left one for each object
    assert store.list("", "") == ["CURRENT"]


def test_a_disk_that_fails_is_not_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    store.put("a/b", b"1")
    scandir = os.scandir

    def fail(path: str) -> object:
        if str(path).endswith("/a"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UnreachableError, match=r"cannot be listed: .*Input/output error"):
        store.objects()


@pytest.mark.parametrize("name", ["log::2", "memory::x", "a[1]", "100%41 #1?"])
def test_any_name_of_a_folder_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (name, f"./{name}/", str(tmp_path / name)):
        Store(url).put("x", url.encode())
        assert (tmp_path / name / "x").read_bytes() == url.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
