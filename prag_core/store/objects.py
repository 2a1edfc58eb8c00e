"""The store: immutable objects under one folder or fsspec URL, and the few rules that make them trustworthy.

Bytes below (fsspec), records above. Objects appear whole or not at all, their names are derived from their
content, and what makes an artefact exist is one small write that comes last: a ledger part for adapters, a
manifest for a corpus version. So a retried task, a late actor or two runs at once can waste work but never
corrupt anything (docs/store.md).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from prag_core.config import NO_CREDENTIALS_HERE, Config, has_credentials
from prag_core.errors import ConflictError, StoreError, UnreachableError
from prag_core.identity import checksum
from prag_core.records import schema

if TYPE_CHECKING:
    from prag_core.store.s3 import S3Objects


T = TypeVar("T")

# Up to here a Parquet part is read whole: looking for its footer and columns costs more requests than bytes saved.
WHOLE_PART_BYTES = 4 << 20


class Store:
    """Bytes under one root: atomic writes, a conditional write, Parquet tables, JSON documents.

    Pickles as its URL and options, so that Ray workers open their own connection. Each failure is a `StoreError`
    that names the object, the cause and what to do; on S3 it comes after bounded retries (`prag_core.store.s3`). It is an
    `UnreachableError` unless the store has answered: that an object is missing, or ends too early, is an answer.

    Args:
        url: A folder, or an fsspec URL such as `s3://bucket/prefix`. Credentials come from the usual AWS
            environment or profile, and so does the endpoint when `options` names none.
        options: What the file system takes besides, such as `endpoint_url` or `profile`.
        retries: How often a failed request to S3 is tried again.
        timeout_s: How long S3 may take to connect or to answer.

    Raises:
        StoreError: when the URL's file system is unknown, or the URL holds credentials.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, retries: int = 5, timeout_s: float = 30.0
    ) -> None:
        if has_credentials(url):
            raise StoreError("the store's URL holds credentials", NO_CREDENTIALS_HERE)
        self.url = url.rstrip("/") or "/"
        self.options = dict(options or {})
        self.retries = retries
        self.timeout_s = timeout_s
        self._s3: S3Objects | None = None
        try:
            if is_s3(self.url):
                from prag_core.store import s3  # botocore takes half a second to import: only those who need it wait

                fs, root = fsspec.core.url_to_fs(self.url, **s3.client_options(self.options, retries, timeout_s))
                self._s3 = s3.S3Objects(fs, retries, timeout_s)
                self._failures: tuple[type[Exception], ...] = s3.FAILURES
            else:
                fs, root = fsspec.core.url_to_fs(self.url, **self.options)
                self._failures = (OSError,)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"store = {url!r}: {error}", "name a folder, or a URL such as s3://bucket/prefix"
            ) from None
        self.fs: Any = fs
        self.root: str = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self.options, self.retries, self.timeout_s)

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Return the full path of an object of the store, as its file system takes it."""
        return posixpath.join(self.root, *parts)

    # ---- bytes

    def check_writable(self) -> None:
        """Write and remove a small object; on S3, see that the conditional write is no mere promise.

        Raises:
            StoreError: naming the store, when that fails.
        """
        path = self.path(f".probe-{uuid.uuid4().hex}")
        with self._explained(f"store = {self.url!r}", "written"):
            self._write(path, b"probe")
            sound = self._s3 is None or self._s3.honours_conditions(path)
            self.fs.rm_file(path)
        if not sound:
            raise StoreError(
                f"store = {self.url!r} ignores the condition of a write (If-None-Match)",
                "take an object store that honours it: without, two runs at once overwrite each other",
            )

    def put(self, name: str, data: bytes) -> None:
        """Write an object that appears whole or not at all; an object of that name is replaced.

        Raises:
            StoreError: when it cannot be written; a reader sees what was there before.
        """
        with self._explained(f"{self.url}/{name}", "written"):
            self._write(self.path(name), data)

    def _write(self, path: str, data: bytes) -> None:
        if self._s3 is not None:
            self._s3.put(path, data)
            return
        if not self.is_local:
            self.fs.pipe_file(path, data)
            return
        with self._scratch(path) as scratch:
            self.fs.pipe_file(scratch, data)

    @contextlib.contextmanager
    def _scratch(self, path: str) -> Iterator[str]:
        """Give a name beside `path` to write to, which becomes `path` when the block has ended well.

        A power cut leaves `path` as it was before, or whole: its bytes are on the disk before it has its name.
        """
        _make_folder(Path(path).parent)
        scratch = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            yield scratch
            _sync(Path(scratch))
            Path(scratch).replace(path)
            _sync(Path(path).parent)
        except BaseException:
            if self.fs.exists(scratch):
                self.fs.rm_file(scratch)
            raise

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return an object's bytes, or a range of them: all that were asked for, or an error.

        Raises:
            StoreError: when there is no such object, it ends before `end`, or the store cannot be read.
        """
        path = self.path(name)
        with self._explained(f"{self.url}/{name}", "read"):
            if self._s3 is not None:
                return self._s3.get(path, start, end)
            data: bytes = self.fs.cat_file(path, start=start, end=end)
        if end is not None and len(data) != end - (start or 0):
            raise StoreError(
                f"{self.url}/{name}: cannot be read: {len(data)} bytes came of {end - (start or 0)}",
                "it was cut short; run `prag run` again, and restore the object if that does not make it",
            )
        return data

    def get_if_exists(self, name: str) -> bytes | None:
        """Return an object's bytes, or None when there is no such object.

        Raises:
            StoreError: when the store cannot be read.
        """
        path = self.path(name)
        with self._explained(f"{self.url}/{name}", "read"):
            if self._s3 is not None:
                return self._s3.get_if_exists(path)
            try:
                data: bytes = self.fs.cat_file(path)
            except FileNotFoundError:
                return None
        return data

    def size(self, name: str) -> int | None:
        """Return an object's bytes in number, or None when there is no such object.

        Raises:
            StoreError: when that cannot be known.
        """
        path = self.path(name)
        with self._explained(f"{self.url}/{name}", "looked up"):
            if self._s3 is not None:
                return self._s3.size(path)
            try:
                return int(self.fs.size(path))
            except FileNotFoundError:
                return None

    def open(self, name: str) -> io.RawIOBase:
        """Open an object for reading at any place; each read is one `get` of a range, whole or an error.

        Raises:
            StoreError: when there is no such object, and later when a read fails.
        """
        size = self.size(name)
        if size is None:
            raise StoreError(f"{self.url}/{name}: no such object")
        return _ObjectReader(self, name, size)

    def put_file(self, name: str, source: Path) -> None:
        """Write an object from a file of this machine without holding it in memory; it appears whole or not at all.

        Raises:
            StoreError: when it cannot be written.
        """
        path = self.path(name)
        with self._explained(f"{self.url}/{name}", "written"):
            if not self.is_local:
                self.fs.put_file(str(source), path)
                return
            with self._scratch(path) as scratch:
                shutil.copyfile(source, scratch)

    def exists(self, name: str) -> bool:
        """Whether an object or a folder of that name exists.

        Raises:
            StoreError: when that cannot be known.
        """
        with self._explained(f"{self.url}/{name}", "looked up"):
            return bool(self.fs.exists(self.path(name)) if self._s3 is None else self._s3.exists(self.path(name)))

    def list(self, folder: str, suffix: str) -> list[str]:
        """Return the names, below the root, of the objects at any depth under `folder` that end with `suffix`.

        Raises:
            StoreError: when the store cannot be listed.
        """
        with self._explained(f"{self.url}/{folder}", "listed"):
            found = self.fs.find(self.path(folder), detail=True)
        files = (path for path, info in found.items() if info["type"] == "file")  # some servers list empty folders
        return sorted(path[len(self.root) + 1 :] for path in files if path.endswith(suffix))

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return what the file system says of each object of the store, by name, by listing alone.

        Raises:
            StoreError: when the store cannot be listed.
        """
        with self._explained(self.url, "listed"):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        return {path[len(self.root) + 1 :]: info for path, info in found.items() if info["type"] == "file"}

    def remove(self, name: str) -> None:
        """Remove an object.

        Raises:
            StoreError: when it cannot be removed.
        """
        with self._explained(f"{self.url}/{name}", "removed"):
            self.fs.rm_file(self.path(name))

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """Replace an object only if its bytes are still `expected` (None: only if it does not exist).

        Of two writers at once one wins, if their bytes differ: who must know that it was they, and not somebody
        with the same bytes, puts a token of their own into them.

        Raises:
            ConflictError: when somebody else changed it first; nothing was written.
            StoreError: when it cannot be written, or the file system has no conditional write.
        """
        path = self.path(name)
        with self._explained(f"{self.url}/{name}", "written"):
            if self._s3 is not None:
                done = self._s3.swap(path, expected, new)
            elif self.is_local:
                _make_folder(Path(path).parent)
                with FileLock(f"{path}.lock"):
                    done = self.get_if_exists(name) == expected
                    if done:
                        self._write(path, new)
            else:
                raise StoreError(
                    f"store = {self.url!r}: its file system has no conditional write", "use a folder or s3://"
                )
        if not done:
            raise ConflictError(f"{self.url}/{name}: changed by somebody else meanwhile", "look, and run again")

    @contextlib.contextmanager
    def _explained(self, what: str, verb: str) -> Iterator[None]:
        """Turn a failure of the file system into a `StoreError`."""
        try:
            yield
        except self._failures as error:
            answered = isinstance(error, FileNotFoundError)
            if self._s3 is not None:
                answered = self._s3.is_answer(error)
                cause, remedy = self._s3.explain(error)
            elif answered:
                cause, remedy = "no such object", ""
            else:
                cause, remedy = str(error), "check the path, its rights and the room on the disk"
            cause = cause if cause == "no such object" else f"cannot be {verb}: {cause}"
            # The chain of causes would show the request in a traceback.
            raise (StoreError if answered else UnreachableError)(f"{what}: {cause}", remedy) from None

    # ---- documents and tables

    def put_json(self, name: str, document: Any) -> None:
        """Write a JSON document."""
        self.put(name, json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True).encode())

    def get_json(self, name: str) -> Any:
        """Return a JSON document.

        Raises:
            StoreError: when it is missing or no JSON.
        """
        try:
            return json.loads(self.get(name))
        except ValueError as error:
            raise StoreError(f"{self.url}/{name}: not JSON: {error}") from None

    def put_table(self, folder: str, table: pa.Table) -> str:
        """Write a Parquet part named by its content, and return its name; the same again changes nothing."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        name = f"{folder}/part-{checksum(data)}.parquet"
        if not self.exists(name):
            self.put(name, data)
        return name

    def get_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one Parquet part, or some columns of it, after checking every byte against the checksum in its name.

        Raises:
            StoreError: when the part is missing or damaged, or lacks a column.
        """
        data = self.get(name)
        stem = posixpath.basename(name).removeprefix("part-").removesuffix(".parquet")
        if len(stem) == len(checksum(b"")) and stem != checksum(data):
            raise StoreError(f"{self.url}/{name}: altered or cut short", "run `prag verify --full`, `prag repair`")
        return self._parsed(name, pa.BufferReader(data), columns)

    def get_columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of one Parquet part; of a big part no other bytes are fetched.

        A big part's pages are checked against their own checksums, but nothing checks its footer: what decides which
        bytes are whose is read by `get_part`.

        Raises:
            StoreError: when the part is missing or damaged, or lacks a column.
        """
        stream = self.open(name)
        if stream.seek(0, io.SEEK_END) <= WHOLE_PART_BYTES:
            return self.get_part(name, columns)
        return self._parsed(name, stream, columns)

    def _parsed(self, name: str, source: Any, columns: Sequence[str] | None) -> pa.Table:
        names = None if columns is None else list(columns)
        try:
            # In this thread alone, which `pq.read_table` cannot: a thread of Arrow's that lets go of the bytes while
            # the process ends, aborts it (pyarrow 26: one of twelve processes that read a part and ended at once).
            table = pq.ParquetFile(source, page_checksum_verification=True).read(names, use_threads=False)
            return table if names is None else table.select(names)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise StoreError(
                f"{self.url}/{name}: not a readable Parquet part: {error}", "run `prag verify --full`, `prag repair`"
            ) from None

    def get_table(self, record: type[T], names: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Read Parquet parts into one table with the columns of `record`, in a fixed order of rows.

        Raises:
            StoreError: when a part is missing or damaged.
        """
        wanted = schema(record)  # type: ignore[arg-type]
        if columns is not None:
            wanted = pa.schema([wanted.field(column) for column in columns])
        tables = [self.get_part(name, wanted.names).cast(wanted) for name in sorted(names)]
        return pa.concat_tables(tables) if tables else wanted.empty_table()


def _make_folder(folder: Path) -> None:
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync(made.parent)


def _sync(path: Path) -> None:
    """Return when a file, or what a folder names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class _ObjectReader(io.RawIOBase):
    """An object of the store as a file for reading."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store = store
        self._name = name
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._store.get(self._name, self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)


def open_store(config: Config) -> Store:
    """Open the store of a configuration, with what its section `storage` says.

    Raises:
        StoreError: see `Store`.
    """
    storage = config.storage
    options: dict[str, Any] = {}
    if is_s3(config.store):
        if storage.endpoint_url is not None:
            options["endpoint_url"] = storage.endpoint_url
        if storage.region is not None:
            options["client_kwargs"] = {"region_name": storage.region}
        if storage.profile is not None:
            options["profile"] = storage.profile
        if storage.anon:
            options["anon"] = True
    return Store(config.store, options, storage.retries, storage.timeout_s)


def is_s3(url: str) -> bool:
    """Whether a URL names an S3 store."""
    return url.startswith(("s3://", "s3a://"))


def remove(store: Store, name: str) -> None:
    """Remove an object; one that is not there is removed already.

    Raises:
        StoreError: when it cannot be removed.
    """
    try:
        store.remove(name)
    except StoreError:
        if store.exists(name):
            raise
