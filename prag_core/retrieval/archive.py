"""Indexes in the store: how one is packed, committed, fetched and opened.

An index is two objects: the archive of its folder, `indexes/<id>/<kind>.tar.zst`, and its record,
`indexes/<id>/index.json`. The record is written last, and that commits the index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
from prag_core.data.parsing import parse_json
from prag_core.errors import REPAIR, RetrievalError, StoreError
from prag_core.identity import KEY_BYTES, seal
from prag_core.records import from_document
from prag_core.retrieval.kinds import Retriever, index_id, index_kind
from prag_core.retrieval.local_cache import explain_os_errors, lock_of, partial_of, remove_old
from prag_core.store.objects import Store

COPY_BYTES = 1 << 25  # on S3 each piece is a request


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """The record of an archived index, as `index.json` holds it.

    `checksum` is that of the archive's bytes. `pyserini` is the version of the software that wrote the index, and
    `rule` the kind's `INDEX_RULE`. Records of older releases have neither `kind` nor `language`: their indexes are
    Lucene's, in English. Nor have they a `rule`: theirs is none of today's.
    """

    id: str
    corpus_version: str
    documents: int
    size_bytes: int
    checksum: str
    pyserini: str
    kind: str = "lucene"
    language: str = "en"
    rule: int = 0

    @property
    def archive_name(self) -> str:
        """The name of the archive, beside the record."""
        return f"{self.kind}.tar.zst"


def read_record(store: Store, id: str) -> StoredIndex | None:
    """Return an index's record, or None when it is missing or garbled.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        return from_document(StoredIndex, parse_json((store.get_if_exists(_record(id)) or b"").decode()))
    except (ValueError, TypeError):  # its writing was cut off
        return None


def find_index(store: Store, id: str) -> StoredIndex | None:
    """Return an index's record, or None when the index must be built.

    It must be built when its record is missing or garbled, or its archive is missing or has another size.

    Raises:
        StoreError: the store cannot be read.
    """
    stored = read_record(store, id)
    return stored if stored and store.size(f"indexes/{id}/{stored.archive_name}") == stored.size_bytes else None


def archive_index(
    directory: Path, store: Store, corpus_version: str, documents: int, config: IndexConfig
) -> StoredIndex:
    """Pack an index folder into the store and commit it; an index that the store already has is left alone.

    Raises:
        StoreError: the store cannot be written, or there is no room beside the folder.
    """
    id = index_id(corpus_version, config)
    if there := find_index(store, id):
        return there
    with explain_os_errors(directory.parent), tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        packed = Path(scratch, "packed")
        _pack(directory, packed)
        stored = StoredIndex(
            id=id,
            corpus_version=corpus_version,
            documents=documents,
            size_bytes=packed.stat().st_size,
            checksum=_checksum(packed),
            pyserini=index_kind(config).writer_version(),
            kind=config.kind,
            language=config.language,
            rule=index_kind(config).INDEX_RULE,
        )
        store.put_file(f"indexes/{id}/{stored.archive_name}", packed)
        store.put_json(_record(id), seal(dataclasses.asdict(stored)))
    return stored


def fetch_index(store: Store, id: str, cache_dir: Path) -> Path:
    """Return a local folder with the index; it is copied from the store unless `cache_dir` has it.

    The archive is unpacked only if its size and checksum are right, and the folder appears at once and whole. Of
    several processes, one copies and the others wait. Copying one removes old ones that are not in use.

    Raises:
        RetrievalError: the store has no such index, or its archive is missing, truncated or altered.
        StoreError: the store cannot be read, or the cache folder cannot be written.
    """
    ready = cache_dir / id
    partial = partial_of(ready)
    if ready.is_dir():
        with suppress(OSError):  # another user's folder, or one that was removed just now
            os.utime(ready)
        return ready
    with explain_os_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_of(ready)):
            if ready.is_dir():
                return ready
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            try:
                _fetch(store, id, partial)
                (partial / "index").rename(ready)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    remove_old(cache_dir)
    return ready


def open_index(store: Store, id: str, cache_dir: Path, config: IndexConfig) -> Retriever:
    """Fetch an index and open it for searching.

    Raises:
        RetrievalError: its kind or language is not the configured one, it was built by another rule than this
            version searches by, or it cannot be opened; see also `fetch_index`.
        StoreError: see `fetch_index`.
    """
    stored = read_record(store, id)
    for setting in ("kind", "language") if stored else ():
        built, configured = getattr(stored, setting), getattr(config, setting)
        if built != configured:
            raise RetrievalError(
                f"the index {id} was built with index.{setting} = {built!r}; index.{setting} is {configured!r} now",
                f"set index.{setting} to {built!r}, or run `prag run` to build and publish another index",
            )
    if stored and stored.rule != (rule := index_kind(config).INDEX_RULE):
        raise RetrievalError(
            f"the index {id} was built by another version of this software (rule {stored.rule or 'unknown'}, now "
            f"{rule}), so a search in it would miss passages",
            "run `prag run` to build and publish another index; no adapter is trained again for it",
        )
    while True:
        folder = fetch_index(store, id, cache_dir)
        try:
            return index_kind(config).open_retriever(folder, config)
        except (RetrievalError, StoreError):
            if folder.is_dir():
                raise
            # Between the two calls another process removed the folder as an old one: fetch it again.


def _fetch(store: Store, id: str, partial: Path) -> None:
    record = f"{store.url}/{_record(id)}"
    stored = read_record(store, id)
    if stored is None:
        raise RetrievalError(f"{record}: no such index in the store", REPAIR)
    name = f"indexes/{id}/{stored.archive_name}"
    archive = f"{store.url}/{name}"
    found_bytes = store.size(name)
    if found_bytes is None:
        raise RetrievalError(f"{archive}: missing, though index.json names it", REPAIR)
    if found_bytes != stored.size_bytes:
        raise RetrievalError(f"{archive}: has {found_bytes} bytes instead of {stored.size_bytes}", REPAIR)
    partial.mkdir()
    packed = partial / "packed"
    with store.open(name) as source, packed.open("wb") as target:
        shutil.copyfileobj(source, target, COPY_BYTES)
    if (checksum := _checksum(packed)) != stored.checksum:
        raise RetrievalError(f"{archive}: altered (checksum {checksum} instead of {stored.checksum})", REPAIR)
    try:
        with pa.CompressedInputStream(str(packed), "zstd") as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            tar.extractall(partial / "index", filter="data")
    except tarfile.TarError as error:
        raise RetrievalError(f"{archive}: not an archive of an index: {error}", REPAIR) from error


def _pack(directory: Path, packed: Path) -> None:
    with pa.CompressedOutputStream(str(packed), "zstd") as out, tarfile.open(fileobj=out, mode="w|") as tar:
        for file in sorted(directory.iterdir()):
            if file.name != "write.lock":
                # The archive does not say who built it.
                tar.add(file, file.name, filter=lambda info: info.replace(uid=0, gid=0, uname="", gname="", deep=False))


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return checksum_stream(stream)


def checksum_stream(stream: IO[bytes] | io.RawIOBase) -> str:
    """Return the checksum of a stream, as `identity.checksum` defines it, without holding its bytes in memory."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    while chunk := stream.read(COPY_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _record(id: str) -> str:
    return f"indexes/{id}/index.json"
