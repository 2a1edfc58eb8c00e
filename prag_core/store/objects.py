"""The store: named objects below one URL, as bytes, JSON documents and Parquet tables.

An object appears whole or not at all, and its name follows from its content. An artefact exists once its record is
written, which is one small write that comes last: a ledger part for adapters, a manifest for a corpus version. So
when a task is retried, or two runs work at once, work can be wasted, but nothing is corrupted: see
docs/guides/maintenance.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.config import NO_CREDENTIALS_HERE, Config, has_credentials, s3_options
from prag_core.data.parsing import parse_json
from prag_core.errors import ConflictError, DamagedError, StoreError, UnreachableError
from prag_core.identity import checksum, is_intact
from prag_core.records import schema
from prag_core.store.backend import StoredObject, TooShortError
from prag_core.store.backends import is_s3, open_backend

T = TypeVar("T")

# A Parquet part of up to this size is read whole: requests for its footer and columns would take longer.
WHOLE_PART_BYTES = 4 << 20


class Store:
    """Objects below one URL: atomic writes, a conditional write, JSON documents, Parquet tables.

    Pickles as its URL and options, so that each Ray worker opens its own connection. Every failure is a `StoreError`
    that names the object, the cause and a remedy. It is a `DamagedError` if the store has answered that an object is
    missing or not what it should be, and an `UnreachableError` if the store has not answered.

    Args:
        url: A folder, or an fsspec URL such as `s3://bucket/prefix`. The AWS environment or profile gives the
            credentials, and the endpoint too if `options` names none.
        options: Further arguments of the fsspec file system, such as `endpoint_url` or `profile`; for S3 also
            `range_reads`, see `StorageConfig`.
        retries: How often a failed request to S3 is repeated.
        timeout_s: How long S3 may take to connect or to answer.

    Raises:
        StoreError: if no file system has this URL's scheme, or the URL holds credentials.
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
        try:
            self._backend = open_backend(self.url, self.options, retries, timeout_s)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"store = {url!r}: {error}", "name a folder, or a URL such as s3://bucket/prefix"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self.options, self.retries, self.timeout_s)

    # ---- bytes

    def check_writable(self) -> None:
        """Write and remove a small object, and check that the store's conditional write obeys its condition.

        Raises:
            StoreError: if one of these fails.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        with self._explained(f"store = {self.url!r}", "written"):
            self._backend.put(probe, b"probe")
            try:
                is_safe = self._backend.honours_conditions(probe)
            finally:
                self._backend.remove(probe)
        if not is_safe:
            raise StoreError(
                f"store = {self.url!r} ignores the condition of a write (If-None-Match)",
                "use a store that obeys it; otherwise two runs at once overwrite each other",
            )

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it. Readers see the old bytes or the new bytes, also after a failure."""
        with self._explained(f"{self.url}/{name}", "written"):
            self._backend.put(name, data)

    def put_file(self, name: str, source: Path) -> None:
        """Write an object from a local file, without holding it in memory. It appears whole or not at all."""
        with self._explained(f"{self.url}/{name}", "written"):
            self._backend.put_file(name, source)

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes of an object, or its bytes from `start` to `end`; never fewer.

        Raises:
            DamagedError: if there is no such object, or it ends before `end`.
        """
        with self._explained(f"{self.url}/{name}", "read"):
            data = self._backend.get(name, start, end)
        if data is None:
            raise DamagedError(f"{self.url}/{name}: no such object")
        return data

    def get_if_exists(self, name: str) -> bytes | None:
        """Return the bytes of an object, or None if there is no such object."""
        with self._explained(f"{self.url}/{name}", "read"):
            return self._backend.get(name)

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, or None if there is no such object."""
        with self._explained(f"{self.url}/{name}", "looked up"):
            return self._backend.size(name)

    def open(self, name: str) -> io.RawIOBase:
        """Open an object for reading at any position. Each read is one `get` of a range."""
        size = self.size(name)
        if size is None:
            raise DamagedError(f"{self.url}/{name}: no such object")
        return _ObjectReader(self, name, size)

    def exists(self, name: str) -> bool:
        """Return whether there is an object or a folder of this name."""
        with self._explained(f"{self.url}/{name}", "looked up"):
            return self._backend.exists(name)

    def list(self, folder: str, suffix: str) -> list[str]:
        """Return the names of the objects at any depth below `folder` that end with `suffix`, sorted."""
        with self._explained(f"{self.url}/{folder}", "listed"):
            found = self._backend.find(folder)
        return sorted(item.name for item in found if item.name.endswith(suffix))

    def objects(self) -> Sequence[StoredObject]:
        """Return all objects of the store with their sizes and times, sorted by name. None of them is opened."""
        with self._explained(self.url, "listed"):
            return sorted(self._backend.find(""), key=lambda item: item.name)

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        with self._explained(f"{self.url}/{name}", "removed"):
            self._backend.remove(name)

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """Replace an object only if its bytes are still `expected` (None: only if it does not exist).

        If two writers swap at the same time, one wins, provided that their `new` bytes differ. A writer that must
        know whether it won puts a random token into its bytes.

        Raises:
            ConflictError: if somebody else changed the object first; nothing was written.
            StoreError: if it cannot be written, or the backend has no conditional write.
        """
        with self._explained(f"{self.url}/{name}", "written"):
            is_done = self._backend.swap(name, expected, new)
        if not is_done:
            raise ConflictError(
                f"{self.url}/{name}: changed by somebody else meanwhile", "check what it says now, and run again"
            )

    @contextlib.contextmanager
    def _explained(self, what: str, verb: str) -> Iterator[None]:
        """Turn a failure of the backend into a `StoreError`."""
        try:
            yield
        except TooShortError as error:
            raise DamagedError(
                f"{what}: cannot be {verb}: {error}",
                "it was cut short; run `prag run` again, and restore the object if that does not make it",
            ) from None
        except self._backend.failures as error:
            cause, remedy = self._backend.explain(error)
            # Without `from None`, a traceback would show the request, and with it perhaps a secret.
            raise UnreachableError(f"{what}: cannot be {verb}: {cause}", remedy) from None

    # ---- documents and tables

    def put_json(self, name: str, document: Any) -> None:
        """Write a JSON document."""
        self.put(name, json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True).encode())

    def get_json(self, name: str) -> Any:
        """Return a JSON document.

        Raises:
            DamagedError: if it is missing, or not JSON.
        """
        try:
            return parse_json(self.get(name).decode())
        except ValueError as error:
            raise DamagedError(f"{self.url}/{name}: not JSON: {error}") from None

    def get_sealed(self, name: str, *fields: str) -> dict[str, Any]:
        """Return a JSON object that was written with `prag_core.identity.seal`.

        Raises:
            DamagedError: if it is missing, not a JSON object, altered, or lacks one of `fields`.
        """
        document = self.get_json(name)
        if not isinstance(document, dict) or not is_intact(document) or not {*fields} <= {*document}:
            raise DamagedError(f"{self.url}/{name}: altered or cut short")
        return document

    def put_table(self, folder: str, table: pa.Table) -> str:
        """Write a table as a Parquet part, and return the part's name, which holds the checksum of its bytes.

        The same table has the same name, so writing it again changes nothing.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        name = f"{folder}/part-{checksum(data)}.parquet"
        if not self.exists(name):
            self.put(name, data)
        return name

    def get_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one Parquet part, or some of its columns, after checking every byte against the checksum in its name.

        Raises:
            DamagedError: if the part is missing or damaged, or lacks a column.
        """
        data = self.get(name)
        stem = posixpath.basename(name).removeprefix("part-").removesuffix(".parquet")
        if len(stem) == len(checksum(b"")) and stem != checksum(data):
            raise DamagedError(f"{self.url}/{name}: altered or cut short")
        return self._parsed(name, pa.BufferReader(data), columns)

    def get_columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of one Parquet part; of a big part, fetch only the bytes of these columns.

        The pages of a big part are checked against their own checksums, but its footer is not. Use `get_part` for
        columns that say where other bytes lie, such as offsets in a ledger.

        Raises:
            DamagedError: if the part is missing or damaged, or lacks a column.
        """
        stream = self.open(name)
        if stream.seek(0, io.SEEK_END) <= WHOLE_PART_BYTES:
            return self.get_part(name, columns)
        return self._parsed(name, stream, columns)

    def _parsed(self, name: str, source: Any, columns: Sequence[str] | None) -> pa.Table:
        names = None if columns is None else list(columns)
        try:
            # `use_threads=False`, which `pq.read_table` does not offer: if one of Arrow's threads frees the bytes
            # while the process ends, it aborts the process (pyarrow 26; seen in one of twelve processes).
            table = pq.ParquetFile(source, page_checksum_verification=True).read(names, use_threads=False)
            return table if names is None else table.select(names)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DamagedError(f"{self.url}/{name}: not a readable Parquet part: {error}") from None

    def get_table(self, record: type[T], names: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Read Parquet parts into one table with the columns of `record`; the order of `names` does not matter.

        Raises:
            DamagedError: if a part is missing or damaged.
        """
        wanted = schema(record)  # type: ignore[arg-type]
        if columns is not None:
            wanted = pa.schema([wanted.field(column) for column in columns])
        tables = [self.get_part(name, wanted.names).cast(wanted) for name in sorted(names)]
        return pa.concat_tables(tables) if tables else wanted.empty_table()


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
    """Open the store of a configuration, with the settings of its section `storage`.

    Raises:
        StoreError: see `Store`.
    """
    storage = config.storage
    options = {**s3_options(storage), "range_reads": storage.range_reads} if is_s3(config.store) else {}
    return Store(config.store, options, storage.retries, storage.timeout_s)
