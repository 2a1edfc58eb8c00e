"""Make the index of a corpus version: update a former index where that is faster, else build from scratch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prag_core.config import IndexConfig
from prag_core.errors import RetrievalError, StoreError
from prag_core.records import Passage, from_table
from prag_core.retrieval.archive import StoredIndex, archive_index, fetch_index, read_record
from prag_core.retrieval.kinds import index_id, index_kind
from prag_core.store.objects import Store
from prag_core.store.tables import corpus_parts

# The largest share of changed passages for which the former index is updated. Up to here an update took at most 0.4
# times as long as a build, most of it the merge (`make bench-scale`). Above it the gain shrinks, and a former index is
# one more thing that can be wrong.
MOST_CHANGED = 0.25


@dataclass(frozen=True, slots=True)
class IndexBuild:
    """How an index was made: by updating a former one, with the numbers of passages, or by a full build.

    `anew` says why it was a full build; it is empty after an update. `failed` is True when the former index should
    have been updated but could not be.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    anew: str = ""
    failed: bool = False

    def __str__(self) -> str:
        if self.anew:
            return f"built from scratch: {self.anew}"
        return f"updated: added {self.added}, changed {self.changed}, removed {self.removed}"


@dataclass(frozen=True)
class CorpusChanges:
    """The changes that turn the index of one corpus version into that of another.

    `gone` are the keys to remove; `written` are the keys to add, by the part of the new version that holds them. A
    changed passage is in both. `passages` is the number of passages in the new version.
    """

    gone: list[str]
    written: Mapping[str, pa.ChunkedArray]
    build: IndexBuild
    passages: int

    @property
    def share(self) -> float:
        """The number of passages to add or to remove, whichever is larger, as a share of the new version."""
        written = self.build.added + self.build.changed
        return max(written, len(self.gone)) / max(1, self.passages)


def make_index(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig
) -> tuple[StoredIndex, IndexBuild]:
    """Make the index of a corpus version in this process, archive it, and return its record and how it was made.

    The index of the corpus version `former` is updated when the store has it with the same settings and written by
    the same software, and at most a quarter of the passages changed. The result searches like a full build. Any
    problem with the former index leads to a full build, not to an error.

    Raises:
        RetrievalError: the index cannot be written; see the index kind's `build_index`.
        StoreError: the corpus cannot be read, or the index cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="prag-index-") as scratch:
        directory = Path(scratch, config.kind)
        build, documents = _update_former(store, corpus_version, former, config, directory)
        if build.anew:
            shutil.rmtree(directory, ignore_errors=True)  # left by an update that failed half-way
            parts = corpus_parts(store, corpus_version)
            passages = (passage for part in parts for passage in _read(store, part))
            documents = index_kind(config).build_index(passages, directory, config)
        return archive_index(directory, store, corpus_version, documents, config), build


def _update_former(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig, directory: Path
) -> tuple[IndexBuild, int]:
    """Fetch the former index into `directory` and update it; return how it was made and how many passages it holds."""
    if former is None:
        return IndexBuild(anew="no corpus was in service"), 0
    id, kind = index_id(former, config), index_kind(config)
    try:
        stored = read_record(store, id)
        if stored is None:
            return IndexBuild(anew=f"the store has no index of the corpus {former} with these settings"), 0
        if stored.pyserini != (version := kind.writer_version()):
            raise RetrievalError(f"version {stored.pyserini} wrote the index {id}, and version {version} is installed")
        changes = find_changes(store, former, corpus_version)
        if changes.share > MOST_CHANGED:
            return IndexBuild(anew=f"{changes.share:.0%} of the passages differ from the corpus {former}"), 0
        fetch_index(store, id, directory.parent).rename(directory)
        written = (passage for part, keys in changes.written.items() for passage in _read(store, part, keys))
        documents = kind.update_index(directory, changes.gone, written, config)
        if documents != changes.passages:
            raise RetrievalError(f"the index {id}, updated, holds {documents} passages, not {changes.passages}")
    except (RetrievalError, StoreError) as error:
        return IndexBuild(anew=error.message, failed=True), 0
    return changes.build, documents


def find_changes(store: Store, old: str, new: str) -> CorpusChanges:
    """Compare two corpus versions by the digests of their passages; a digest covers all that an index stores of one.

    Needs about 300 bytes of memory for each passage of the larger version, and reads no text.

    Raises:
        StoreError: when a version cannot be read, or an older release wrote it, whose passages have no digests.
    """
    parts = corpus_parts(store, new)
    before, after = _digests(store, corpus_parts(store, old)), _digests(store, parts)
    gone = before.filter(pc.invert(pc.is_in(before["digest"], value_set=after["digest"])))["key"]
    rows = after.filter(pc.invert(pc.is_in(after["digest"], value_set=before["digest"])))
    changed = int(pc.sum(pc.is_in(rows["key"], value_set=gone)).as_py() or 0)
    return CorpusChanges(
        gone=gone.to_pylist(),
        written={
            parts[number]: rows.filter(pc.equal(rows["part"], number))["key"]
            for number in rows["part"].unique().to_pylist()
        },
        build=IndexBuild(added=len(rows) - changed, changed=changed, removed=len(gone) - changed),
        passages=len(after),
    )


def _digests(store: Store, parts: list[str]) -> pa.Table:
    tables = [pa.schema({"key": pa.string(), "digest": pa.string(), "part": pa.int32()}).empty_table()]
    for number, part in enumerate(parts):
        table = store.get_columns(part, ["key", "digest"])
        tables.append(table.append_column("part", pa.repeat(pa.scalar(number, pa.int32()), len(table))))
    return pa.concat_tables(tables)


def _read(store: Store, part: str, keys: pa.ChunkedArray | None = None) -> Iterator[Passage]:
    """Read the passages of a corpus part; with `keys`, only those."""
    with store.open(part) as stream:
        for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches():
            rows = pa.Table.from_batches([batch])
            yield from from_table(Passage, rows if keys is None else rows.filter(pc.is_in(rows["key"], value_set=keys)))
