"""The store: immutable objects under one folder or fsspec URL, and the few rules that make them trustworthy.

Bytes below (fsspec), records above. Objects appear whole or not at all, their names are derived from their
content, and what makes an artefact exist is one small write that comes last: a ledger part for adapters, a
manifest for a corpus version. So a retried task, a late actor or two runs at once can waste work but never
corrupt anything (design, sections 3 and 7).
"""

from __future__ import annotations

import json
import posixpath
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from prag_core.errors import ConflictError, StoreError
from prag_core.identity import checksum
from prag_core.records import Augmentation, Reject, schema, to_table

T = TypeVar("T")


class Store:
    """Bytes under one root: atomic writes, a conditional write, Parquet tables, JSON documents.

    Pickles as its URL and options, so that Ray workers open their own connection.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/") or "/"
        self.options = dict(options or {})
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"store = {url!r}: {error}", "name a folder, or a URL such as s3://bucket/prefix"
            ) from None
        self.fs: Any = fs
        self.root: str = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self.options)

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Return the full path of an object of the store, as its file system takes it."""
        return posixpath.join(self.root, *parts)

    # ---- bytes

    def check_writable(self) -> None:
        """Write and remove a small object.

        Raises:
            StoreError: naming the store, when that fails.
        """
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.put(name, b"probe")
            self.fs.rm_file(self.path(name))
        except OSError as error:
            raise StoreError(f"store = {self.url!r} cannot be written: {error}", "check the path and rights") from None

    def put(self, name: str, data: bytes) -> None:
        """Write an object that appears whole or not at all; an object of that name is replaced."""
        path = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(path, data)  # object stores show an object when it is complete
            return
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        scratch = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self.fs.pipe_file(scratch, data)
            Path(scratch).replace(path)
        except BaseException:
            if self.fs.exists(scratch):
                self.fs.rm_file(scratch)
            raise

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return an object's bytes, or a range of them.

        Raises:
            StoreError: when there is no such object, or the store cannot be read.
        """
        try:
            data: bytes = self.fs.cat_file(self.path(name), start=start, end=end)
        except FileNotFoundError:
            raise StoreError(f"{self.url}/{name}: no such object") from None
        except OSError as error:
            raise StoreError(f"{self.url}/{name}: cannot be read: {error}") from error
        return data

    def exists(self, name: str) -> bool:
        """Whether an object or a folder of that name exists."""
        return bool(self.fs.exists(self.path(name)))

    def list(self, folder: str, suffix: str) -> list[str]:
        """Return the names, below the root, of the objects at any depth under `folder` that end with `suffix`."""
        found = self.fs.find(self.path(folder))
        return sorted(path[len(self.root) + 1 :] for path in found if path.endswith(suffix))

    def swap(self, name: str, expected: bytes | None, new: bytes) -> None:
        """Replace an object only if its bytes are still `expected` (None: only if it does not exist).

        Raises:
            ConflictError: when somebody else changed it first; nothing was written.
            StoreError: when the file system has no conditional write.
        """
        conflict = ConflictError(f"{self.url}/{name}: changed by somebody else meanwhile", "look, and run again")
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
            with FileLock(f"{self.path(name)}.lock"):
                current = self.get(name) if self.exists(name) else None
                if current != expected:
                    raise conflict
                self.put(name, new)
            return
        if "s3" not in self.fs.protocol:
            raise StoreError(f"store = {self.url!r}: its file system has no conditional write", "use a folder or s3://")
        try:
            if expected is None:
                self.fs.pipe_file(self.path(name), new, mode="create")
                return
            etag = self.fs.info(self.path(name), refresh=True)["ETag"]
            if self.get(name) != expected:
                raise conflict
            bucket, key, _ = self.fs.split_path(self.path(name))
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=new, IfMatch=etag)
        except FileExistsError:
            raise conflict from None
        except OSError as error:  # s3fs reports a failed precondition as errno 22 with this text
            if "pre-condition" in str(error).lower() or "precondition" in str(error).lower():
                raise conflict from None
            raise StoreError(f"{self.url}/{name}: cannot be written: {error}") from error

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
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        name = f"{folder}/part-{checksum(data)}.parquet"
        if not self.exists(name):
            self.put(name, data)
        return name

    def get_columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of one Parquet part; of a big part no other bytes are fetched.

        Raises:
            StoreError: when the part is missing or damaged, or lacks a column.
        """
        try:
            with self.fs.open(self.path(name)) as stream:
                return pq.read_table(stream, columns=list(columns)).select(columns)
        except FileNotFoundError:
            raise StoreError(f"{self.url}/{name}: no such object") from None
        except (pa.ArrowException, OSError, KeyError) as error:
            raise StoreError(f"{self.url}/{name}: not a readable Parquet part: {error}") from None

    def get_table(self, record: type[T], names: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Read Parquet parts into one table with the columns of `record`, in a fixed order of rows.

        Raises:
            StoreError: when a part is missing or damaged.
        """
        wanted = schema(record)  # type: ignore[arg-type]
        if columns is not None:
            wanted = pa.schema([wanted.field(column) for column in columns])
        tables = []
        for name in sorted(names):
            data = self.get(name)
            # Parquet has no checksum of its own here: an altered page can decode to other values without a word.
            stem = posixpath.basename(name).removeprefix("part-").removesuffix(".parquet")
            if len(stem) == len(checksum(b"")) and stem != checksum(data):
                raise StoreError(f"{self.url}/{name}: altered or cut short", "run `prag verify --full`, `prag repair`")
            try:
                part = pq.read_table(pa.BufferReader(data), columns=wanted.names)
            except (pa.ArrowException, OSError) as error:
                raise StoreError(f"{self.url}/{name}: not a readable Parquet part: {error}") from None
            tables.append(part.cast(wanted))
        return pa.concat_tables(tables) if tables else wanted.empty_table()


def put_augmentations(store: Store, recipe: str, rows: Iterable[Augmentation]) -> str:
    """Store augmentations of one augment recipe as they are made, each with its digest in a column of its own.

    Who asks what is done reads the digests alone, not the texts.
    """
    rows = list(rows)
    digests = pa.array([row.digest for row in rows], pa.string())
    table = to_table(Augmentation, rows).append_column("digest", digests)
    return store.put_table(f"augmentations/{recipe}", table)


def put_rejects(store: Store, run: str, rows: Sequence[Reject]) -> None:
    """Store rejects, by the stage that gave them up."""
    for stage in sorted({row.stage for row in rows}):
        store.put_table(f"rejects/{stage}/{run}", to_table(Reject, [row for row in rows if row.stage == stage]))
