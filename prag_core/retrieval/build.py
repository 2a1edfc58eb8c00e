"""The index of a corpus version: a former one brought up to date where that pays, else one built anew."""

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
from prag_core.retrieval.archive import StoredIndex, archive_index, fetch_index, pyserini_version, read_record
from prag_core.retrieval.lucene import build_index, index_id, update_index
from prag_core.store.objects import Store
from prag_core.store.tables import corpus_parts

# Up to here a former index brought up to date took four tenths of the time of one built anew, or less, most of it the
# merge (`make bench-scale`). Above, the gain shrinks, and a former index is one more thing that can be wrong.
MOST_CHANGED = 0.25


@dataclass(frozen=True, slots=True)
class IndexBuild:
    """How an index was made: from a former one, by so many passages, or `anew`, which says why.

    `failed` says that a former one should have been used and could not be.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    anew: str = ""
    failed: bool = False

    def __str__(self) -> str:
        if self.anew:
            return f"built anew: {self.anew}"
        return f"brought up to date: added {self.added}, changed {self.changed}, removed {self.removed}"


@dataclass(frozen=True)
class CorpusChanges:
    """What makes the index of one corpus version that of another; a passage that changed is gone and written.

    `gone` are keys; `written` are keys by the part of the new version that has them; `passages` are all it has.
    """

    gone: list[str]
    written: Mapping[str, pa.ChunkedArray]
    making: IndexBuild
    passages: int

    @property
    def share(self) -> float:
        """The passages to write or to take out, whichever are more, as a share of the new version."""
        written = self.making.added + self.making.changed
        return max(written, len(self.gone)) / max(1, self.passages)


def make_index(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig
) -> tuple[StoredIndex, IndexBuild]:
    """Make the index of a corpus version in this process, archive it, and say how it was made.

    The index of the corpus version `former` is brought up to date, when the store has it with the same settings and
    from the same Pyserini, and no more than a quarter has changed; what comes out searches as if built anew. No
    trouble with it is an error: then the index is built anew.

    Raises:
        RetrievalError: no Java, no room on this machine, or a passage without any text.
        StoreError: the corpus cannot be read, or the index cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="prag-index-") as scratch:
        directory = Path(scratch, "lucene")
        making, documents = _bring_up_to_date(store, corpus_version, former, config, directory)
        if making.anew:
            shutil.rmtree(directory, ignore_errors=True)  # where it failed half-way
            parts = corpus_parts(store, corpus_version)
            documents = build_index((passage for part in parts for passage in _read(store, part)), directory)
        return archive_index(directory, store, index_id(corpus_version, config), corpus_version, documents), making


def _bring_up_to_date(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig, directory: Path
) -> tuple[IndexBuild, int]:
    """Fetch the former index into `directory` and change what differs; return how many passages it holds then."""
    if former is None:
        return IndexBuild(anew="no corpus was in service"), 0
    id = index_id(former, config)
    try:
        stored = read_record(store, id)
        if stored is None:
            return IndexBuild(anew=f"the store has no index of the corpus {former} with these settings"), 0
        if stored.pyserini != pyserini_version():
            raise RetrievalError(f"the index {id} is of Pyserini {stored.pyserini}, and this is {pyserini_version()}")
        changes = find_changes(store, former, corpus_version)
        if changes.share > MOST_CHANGED:
            return IndexBuild(anew=f"{changes.share:.0%} of the passages differ from the corpus {former}"), 0
        fetch_index(store, id, directory.parent).rename(directory)
        written = (passage for part, keys in changes.written.items() for passage in _read(store, part, keys))
        documents = update_index(directory, changes.gone, written)
        if documents != changes.passages:
            raise RetrievalError(f"the index {id}, up to date, holds {documents} passages, not {changes.passages}")
    except (RetrievalError, StoreError) as error:
        return IndexBuild(anew=error.message, failed=True), 0
    return changes.making, documents


def find_changes(store: Store, old: str, new: str) -> CorpusChanges:
    """Compare two corpus versions by the digests of their passages, which are over all that an index keeps of one.

    Takes some 300 bytes of memory a passage of the larger version, and reads no text.

    Raises:
        StoreError: when one of them cannot be read, or is of an older release, whose passages have no digests.
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
        making=IndexBuild(added=len(rows) - changed, changed=changed, removed=len(gone) - changed),
        passages=len(after),
    )


def _digests(store: Store, parts: list[str]) -> pa.Table:
    tables = [pa.schema({"key": pa.string(), "digest": pa.string(), "part": pa.int32()}).empty_table()]
    for number, part in enumerate(parts):
        table = store.get_columns(part, ["key", "digest"])
        tables.append(table.append_column("part", pa.repeat(pa.scalar(number, pa.int32()), len(table))))
    return pa.concat_tables(tables)


def _read(store: Store, part: str, keys: pa.ChunkedArray | None = None) -> Iterator[Passage]:
    """Read the passages of a part of a corpus, or those with these keys."""
    with store.open(part) as stream:
        for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches():
            rows = pa.Table.from_batches([batch])
            yield from from_table(Passage, rows if keys is None else rows.filter(pc.is_in(rows["key"], value_set=keys)))
