"""An index in the store: packed, committed, fetched and opened."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from prag_core.config import IndexConfig
from prag_core.errors import REPAIR, RetrievalError, StoreError
from prag_core.identity import checksum
from prag_core.retrieval import archive
from prag_core.retrieval.archive import archive_index, fetch_index, find_index, open_index
from prag_core.retrieval.kinds import index_id
from prag_core.retrieval.lucene import LuceneRetriever, build_index
from prag_core.store.objects import Store
from tests.helpers.passages import PASSAGES

CONFIG = IndexConfig()
ID = index_id("v1", CONFIG)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lucene") / "index"
    build_index(PASSAGES, directory, CONFIG)
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that travels like an index; no Java is needed to pack and unpack it."""
    directory = tmp_path / "built"
    directory.mkdir()
    (directory / "_0.cfs").write_bytes(os.urandom(50_000))
    (directory / "segments_1").write_bytes(b"segments")
    (directory / "write.lock").touch()
    return directory


@pytest.mark.slow
def test_an_index_searches_alike_after_its_travel(store, index: Path, tmp_path: Path) -> None:
    archive_index(index, store, "v1", len(PASSAGES), CONFIG)
    opened = open_index(store, ID, tmp_path / "cache", CONFIG)
    assert opened.search("orven bridge", 5) == LuceneRetriever(index, CONFIG).search("orven bridge", 5)


def test_round_trip_and_record(store, folder: Path, tmp_path: Path) -> None:
    assert find_index(store, ID) is None
    stored = archive_index(folder, store, "v1", 10, CONFIG)
    data = store.get(f"indexes/{ID}/lucene.tar.zst")
    assert (stored.documents, stored.corpus_version, stored.pyserini) == (10, "v1", "1.6.0")
    assert (stored.size_bytes, stored.checksum) == (len(data), checksum(data))
    assert find_index(store, ID) == stored
    fetched = fetch_index(store, ID, tmp_path / "cache")
    assert {f.name: f.read_bytes() for f in fetched.iterdir()} == {
        name: (folder / name).read_bytes() for name in ("_0.cfs", "segments_1")
    }
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "store") == ["built", "cache"]


def test_the_record_is_written_last(store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._backend, "put", refuse)
    with pytest.raises(StoreError, match="No space left"):
        archive_index(folder, store, "v1", 10, CONFIG)
    assert store.exists(f"indexes/{ID}/lucene.tar.zst")
    assert find_index(store, ID) is None


def test_a_committed_index_is_never_written_again(store, folder: Path) -> None:
    first = archive_index(folder, store, "v1", 10, CONFIG)
    before = store.get(f"indexes/{ID}/lucene.tar.zst")
    (folder / "_0.cfs").write_bytes(b"built by a zombie")
    assert archive_index(folder, store, "v1", 11, CONFIG) == first
    assert store.get(f"indexes/{ID}/lucene.tar.zst") == before


def test_a_complete_cache_is_used_without_the_store(store, folder: Path, tmp_path: Path) -> None:
    archive_index(folder, store, "v1", 10, CONFIG)
    first = fetch_index(store, ID, tmp_path / "cache")
    for name in store.list(f"indexes/{ID}", ""):
        store.remove(name)
    assert fetch_index(store, ID, tmp_path / "cache") == first


def test_leftovers_of_a_killed_process_are_removed(store, folder: Path, tmp_path: Path) -> None:
    archive_index(folder, store, "v1", 10, CONFIG)
    (tmp_path / "cache" / f".{ID}.partial" / "index").mkdir(parents=True)
    (tmp_path / "cache" / f".{ID}.partial" / "index" / "stale").touch()
    fetched = fetch_index(store, ID, tmp_path / "cache")
    assert not (fetched / "stale").exists()


def test_of_many_threads_one_copies(store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_index(folder, store, "v1", 10, CONFIG)
    copies, fetch = [], archive._fetch

    def counted(*arguments):
        copies.append(arguments)
        fetch(*arguments)

    monkeypatch.setattr(archive, "_fetch", counted)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch_index(store, ID, tmp_path / "cache"), range(16)))
    assert len(folders) == len(copies) == 1


def test_the_newest_unpacked_indexes_are_kept(store, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ids = [archive_index(folder, store, f"v{number}", 10, CONFIG).id for number in range(5)]
    for id in ids:
        opened = fetch_index(store, id, cache)
        fetch_index(store, ids[0], cache)  # opened again and again
        for kept in cache.iterdir():
            os.utime(kept, (0, kept.stat().st_mtime - 10))  # so much later is the next one
        assert opened.is_dir()
    assert {found.name for found in cache.iterdir() if found.is_dir()} == {ids[0], *ids[3:]}


@pytest.mark.slow
def test_an_index_in_use_is_never_removed(index: Path, tmp_path: Path) -> None:
    store, cache = Store(str(tmp_path / "store")), tmp_path / "cache"
    ids = [archive_index(index, store, f"v{number}", len(PASSAGES), CONFIG).id for number in range(6)]
    opened = [open_index(store, id, cache, CONFIG) for id in ids[:5]]
    assert [len(one.search("quennel", 1)) for one in opened] == [1] * 5
    for one in opened:
        one.close()
        one.close()
    with pytest.raises(RetrievalError, match="search failed"):
        opened[0].search("quennel", 1)
    open_index(store, ids[5], cache, CONFIG)
    assert {found.name for found in cache.iterdir() if found.is_dir()} == set(ids[3:])
    assert open_index(store, ids[0], cache, CONFIG).search("quennel", 1)[0].passage == PASSAGES[5]


def damage(store: Store, name: str, how: str) -> None:
    data = bytearray(store.get(name))
    if how == "missing":
        store.remove(name)
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "longer":
        data += b"x"
    else:
        data[len(data) // 2] ^= 1
    store.put(name, bytes(data))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "longer", "altered"])
def test_a_damaged_archive_is_named_and_leaves_no_cache(how: str, store, folder: Path, tmp_path: Path) -> None:
    archive = f"indexes/{ID}/lucene.tar.zst"
    archive_index(folder, store, "v1", 10, CONFIG)
    damage(store, archive, how)
    with pytest.raises(RetrievalError) as caught:
        fetch_index(store, ID, tmp_path / "cache")
    assert f"{store.url}/{archive}" in caught.value.message
    assert caught.value.remedy == REPAIR
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []
    # A wrong size alone leads to a rebuild; otherwise `prag repair` removes the record.
    if how == "altered":
        store.remove(f"indexes/{ID}/index.json")
    assert find_index(store, ID) is None
    archive_index(folder, store, "v1", 10, CONFIG)
    assert fetch_index(store, ID, tmp_path / "cache").is_dir()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b'{"id": "x"}', b"\xff"])
def test_a_garbled_record_is_no_commit(text: bytes, store, folder: Path, tmp_path: Path) -> None:
    archive_index(folder, store, "v1", 10, CONFIG)
    store.put(f"indexes/{ID}/index.json", text)
    assert find_index(store, ID) is None
    with pytest.raises(RetrievalError, match="no such index") as caught:
        fetch_index(store, ID, tmp_path / "cache")
    assert caught.value.remedy == REPAIR


def test_an_archive_cannot_write_outside_its_folder(store, folder: Path, tmp_path: Path) -> None:
    archive_index(folder, store, "v1", 10, CONFIG)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../evil"), io.BytesIO())
    data = pa.Codec("zstd").compress(plain.getvalue(), asbytes=True)
    record = json.loads(store.get(f"indexes/{ID}/index.json"))
    record |= {"size_bytes": len(data), "checksum": checksum(data)}
    store.put(f"indexes/{ID}/lucene.tar.zst", data)
    store.put(f"indexes/{ID}/index.json", json.dumps(record).encode())
    with pytest.raises(RetrievalError, match="evil"):
        fetch_index(store, ID, tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))
