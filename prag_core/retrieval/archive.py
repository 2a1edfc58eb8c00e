"""How a Lucene index travels through the store.

There it is `indexes/<id>/lucene.tar.zst`, then `indexes/<id>/index.json`, whose write is the commit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from filelock import FileLock

from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError, StoreError
from prag_core.identity import KEY_BYTES, seal
from prag_core.records import from_dict
from prag_core.retrieval import local_cache as index_folders
from prag_core.retrieval.lucene import LuceneRetriever
from prag_core.store.objects import Store

COPY_BYTES = 1 << 25  # on S3 each piece is a request


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """What `index.json` says about an archived index; `checksum` is over the archive's bytes."""

    id: str
    corpus_version: str
    documents: int
    size_bytes: int
    checksum: str
    pyserini: str


def read_record(store: Store, id: str) -> StoredIndex | None:
    """Return what `index.json` says, or None when it is missing or garbled.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        return from_dict(StoredIndex, json.loads(store.get_if_exists(_record(id)) or b""))
    except (ValueError, TypeError):  # a garbled one was cut off while it was written
        return None


def pyserini_version() -> str:
    """Return the version of the Pyserini that writes indexes here."""
    return importlib.metadata.version("pyserini")


def find_index(store: Store, id: str) -> StoredIndex | None:
    """Return what the store says about an index, or None when it must be (re)built.

    That is: `index.json` is missing or garbled, or its archive is missing or has another size.

    Raises:
        StoreError: the store cannot be read.
    """
    stored = read_record(store, id)
    return stored if stored and store.size(_archive(id)) == stored.size_bytes else None


def archive_index(directory: Path, store: Store, id: str, corpus_version: str, documents: int) -> StoredIndex:
    """Pack an index folder into the store and commit it; one that is there already is left alone.

    Raises:
        StoreError: the store cannot be written, or there is no room beside the folder.
    """
    if there := find_index(store, id):
        return there
    with index_folders.reaching(f"{directory.parent}"), tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        packed = Path(scratch, "lucene.tar.zst")
        _pack(directory, packed)
        size_bytes, checksum = packed.stat().st_size, _checksum(packed)
        store.put_file(_archive(id), packed)
        stored = StoredIndex(id, corpus_version, documents, size_bytes, checksum, pyserini_version())
        store.put_json(_record(id), seal(dataclasses.asdict(stored)))
    return stored


def fetch_index(store: Store, id: str, cache_dir: Path) -> Path:
    """Return a local folder with the index, copied from the store unless `cache_dir` has it already.

    When it is copied, those that were opened longest ago are removed, unless they are in use. Nothing is unpacked
    before its size and checksum fit, and the folder appears at once and whole; of several processes one copies and
    the others wait.

    Raises:
        RetrievalError: the store has no such index, or its archive is missing, truncated or altered.
        StoreError: the store cannot be read, or the cache folder cannot be written.
    """
    ready = cache_dir / id
    partial = index_folders.partial_of(ready)
    if ready.is_dir():
        with suppress(OSError):  # a folder that others own, or one that was removed just now
            os.utime(ready)
        return ready
    with index_folders.reaching(f"{cache_dir}"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(index_folders.lock_of(ready)):
            if ready.is_dir():
                return ready
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
            try:
                _fetch(store, id, partial)
                (partial / "index").rename(ready)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    index_folders.tidy(cache_dir)
    return ready


def open_index(store: Store, id: str, cache_dir: Path, config: IndexConfig) -> LuceneRetriever:
    """Fetch an index and open it for searching; see `fetch_index` and `LuceneRetriever` for what they raise."""
    while True:
        folder = fetch_index(store, id, cache_dir)
        try:
            return LuceneRetriever(folder, config.k1, config.b)
        except (RetrievalError, StoreError):
            if folder.is_dir():
                raise
            # Another process removed it between the two, as one that nobody had opened for long.


def _fetch(store: Store, id: str, partial: Path) -> None:
    archive, record = f"{store.url}/{_archive(id)}", f"{store.url}/{_record(id)}"
    stored = read_record(store, id)
    if stored is None:
        raise RetrievalError(f"{record}: no such index in the store", "run `prag run` to build it")
    remedy = f"remove {record} and run `prag run` again: it builds the index anew"
    found_bytes = store.size(_archive(id))
    if found_bytes is None:
        raise RetrievalError(f"{archive}: missing, though index.json names it", remedy)
    if found_bytes != stored.size_bytes:
        raise RetrievalError(f"{archive}: has {found_bytes} bytes instead of {stored.size_bytes}", remedy)
    partial.mkdir()
    packed = partial / "lucene.tar.zst"
    with store.open(_archive(id)) as source, packed.open("wb") as target:
        shutil.copyfileobj(source, target, COPY_BYTES)
    if (checksum := _checksum(packed)) != stored.checksum:
        raise RetrievalError(f"{archive}: altered (checksum {checksum} instead of {stored.checksum})", remedy)
    try:
        with pa.CompressedInputStream(str(packed), "zstd") as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            tar.extractall(partial / "index", filter="data")
    except tarfile.TarError as error:
        raise RetrievalError(f"{archive}: not an archive of an index: {error}", remedy) from error


def _pack(directory: Path, packed: Path) -> None:
    with pa.CompressedOutputStream(str(packed), "zstd") as out, tarfile.open(fileobj=out, mode="w|") as tar:
        for file in sorted(directory.iterdir()):
            if file.name != "write.lock":
                # The builder's name and ids are nobody's business.
                tar.add(file, file.name, filter=lambda info: info.replace(uid=0, gid=0, uname="", gname="", deep=False))


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return checksum_stream(stream)


def checksum_stream(stream: IO[bytes] | io.RawIOBase) -> str:
    """Return the checksum (that of `identity.checksum`) of a stream, without holding it in memory."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    while chunk := stream.read(COPY_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _archive(id: str) -> str:
    return f"indexes/{id}/lucene.tar.zst"


def _record(id: str) -> str:
    return f"indexes/{id}/index.json"
