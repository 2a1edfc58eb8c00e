"""Looks at a corpus for which there are no settings yet: its files, its fields, how many records it has.

Only the beginnings of large files are read, so that even a corpus of millions takes seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.config import Columns, CorpusConfig, StorageConfig
from prag_core.data.corpus import Piece, read_records
from prag_core.data.files import open_file, open_filesystem
from prag_core.data.listing import CorpusFile, Listing, list_files
from prag_core.data.parsing import parse_tsv
from prag_core.data.readers import BAD_RECORD, quote_names, read_jsonl
from prag_core.errors import InputError
from prag_core.records import Reject

# What other corpora call the three fields, the most telling name first.
_OTHER_NAMES = {
    "id": ("_id", "docid", "doc_id", "passage_id", "pid", "uid", "key"),
    "title": ("headline", "heading", "name", "page_title"),
    "text": ("contents", "content", "body", "passage", "passage_text", "paragraph", "abstract"),
}
# How much is looked at: files, records of all files together for the fields and rejects, bytes for the count.
_FILES = 50
_RECORDS = 500
_COUNTED_BYTES = 64_000_000
# Opening a file takes as long as reading so much of one.
_OPENING_BYTES = 64_000
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds.

    `fields` are the names in its records, in their order; plain text has none. `columns` says which of them are used.
    `records` is their number; `certainty` stands before it: empty if they were counted, else `about` or `at least`.
    `sampled` is the number of records that were read, `passages` what became of them, `rejected` those that cannot be
    used.
    """

    listing: Listing
    fields: tuple[str, ...]
    columns: Columns
    records: int
    certainty: Literal["", "about", "at least"]
    sampled: int
    passages: int
    rejected: tuple[Reject, ...]


def inspect_corpus(config: CorpusConfig, storage: StorageConfig | None = None) -> CorpusSummary:
    """Look at the corpus that `config.path` names.

    A column that `config.columns` leaves at its default, and that no record has, is searched under other usual names.

    Raises:
        InputError: when there is no file to read, no field holds texts, or most records that were read cannot be used.
    """
    listing = list_files(config, storage)
    fs, _ = open_filesystem(config.path, storage)
    looked = listing.files[:_FILES]
    fields = tuple(dict.fromkeys(name for file in looked for name in _field_names(fs, file, config)))
    if fields:
        config = config.model_copy(update={"columns": _find_columns(fields, config.columns, looked)})
    each = max(5, _RECORDS // len(looked))
    read = [item for file in looked for item in _first_records(file, each, config, storage)]
    rejected = tuple(item for item in read if isinstance(item, Reject))
    pieces = [item for item in read if isinstance(item, Piece)]
    used = {(piece.file, piece.line) for piece in pieces}
    if len(rejected) > len(used):  # so a run would fail too
        first, share = rejected[0], f"{len(rejected)} of {len(rejected) + len(used)}"
        raise InputError(
            f"{first.source}: cannot be used, as {share} records that were read: {first.detail}",
            "a corpus is JSON Lines (one object a line), TSV with a header, Parquet, or plain text files",
        )
    records, certainty = _count(fs, listing.files, used)
    return CorpusSummary(
        listing, fields, config.columns, records, certainty, len(used) + len(rejected), len(pieces), rejected
    )


def _find_columns(fields: Sequence[str], given: Columns, files: Sequence[CorpusFile]) -> Columns:
    """Return the given columns; for a usual one that is not there, another usual name that is."""
    found = given.model_dump()
    for role, others in _OTHER_NAMES.items():
        usual = Columns.model_fields[role].default
        if found[role] == usual and usual not in fields:
            lower = {name.lower(): name for name in reversed(fields)}
            found[role] = next((lower[name] for name in (usual, *others) if name in lower), usual)
    if found["text"] not in fields:
        raise InputError(
            f"{files[0].url}: no field {found['text']!r} with the texts; there are {quote_names(fields)}",
            "name the field that holds the texts by `--text FIELD`; the first line of a TSV must name its fields",
        )
    return Columns(**found)


def _field_names(fs: Any, file: CorpusFile, config: CorpusConfig) -> list[str]:
    """Return the names of the fields in a file: of its columns, or of its first records."""
    if file.format == "text":
        return []
    try:
        with open_file(fs, file.name, seekable=file.format == "parquet") as stream:
            if file.format == "parquet":
                return list(pq.ParquetFile(stream).schema_arrow.names)
            if file.format == "tsv":
                line = stream.readline(config.max_record_bytes).decode("utf-8-sig", errors="replace")
                return [name.strip() for name in parse_tsv(line)]
            rows = itertools.islice(read_jsonl(stream, file, config), 100)
            return list(dict.fromkeys(name for _, row in rows if not isinstance(row, BAD_RECORD) for name in row))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{file.url}: cannot be read: {error}", "the file is damaged: get it again") from None


def _first_records(
    file: CorpusFile, limit: int, config: CorpusConfig, storage: StorageConfig | None
) -> Iterator[Piece | Reject]:
    """Yield all that becomes of the first records of a file."""
    places = set()
    for item in read_records(file, config, storage):
        places.add(item.line if isinstance(item, Piece) else item.source)
        if len(places) > limit:
            return
        yield item


def _count(
    fs: Any, files: Sequence[CorpusFile], used: set[tuple[str, int]]
) -> tuple[int, Literal["", "about", "at least"]]:
    """Return the number of records, and how sure it is: beyond some bytes it is estimated from the files' sizes."""
    texts = sum(file.format == "text" for file in files)
    others = [file for file in files if file.format != "text"]
    records, left, sizes_read = 0, _COUNTED_BYTES, 0.0
    for n, file in enumerate(others):
        opened = _Remembering(fs)
        with open_file(opened, file.name, seekable=file.format == "parquet") as stream:
            if file.format == "parquet":
                count, read, whole = pq.ParquetFile(stream).metadata.num_rows, 0, True
            else:
                count, read, whole = _count_lines(stream, left)
                count -= file.format == "tsv"
            records += count
            left -= read + _OPENING_BYTES
            last = n == len(others) - 1
            if whole and (last or left > 0):
                sizes_read += _size(fs, file) or 0
                continue
            sizes_read += (_size(fs, file) or 0) if whole else opened.position()
        sizes = [_size(fs, other) for other in others]
        if not sizes_read or None in sizes:
            return max(records, len(used)) + texts, "at least"
        estimate = records * sum(size or 0 for size in sizes) / sizes_read + texts
        return int(float(f"{estimate:.2g}")), "about"
    return records + texts, ""


def _count_lines(stream: IO[bytes], limit: int) -> tuple[int, int, bool]:
    """Return the number of lines that are not blank, the bytes read, and whether that was all of the file."""
    lines = read = 0
    begun = False
    while line := stream.readline(_CHUNK_BYTES):
        begun = begun or not line.isspace()
        read += len(line)
        if line.endswith(b"\n"):
            lines += begun
            begun = False
            if read > limit:
                return lines, read, False
    return lines + begun, read, True


def _size(fs: Any, file: CorpusFile) -> int | None:
    size: int | None = fs.size(file.name)
    return size


class _Remembering:
    """A file system that remembers the file it has opened: its position says how much of a packed file was read."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._file: Any = None

    def open(self, name: str, mode: str, **options: Any) -> Any:
        self._file = self._fs.open(name, mode, **options)
        return self._file

    def position(self) -> int:
        """Return how many stored bytes were read; 0 where the file system does not say."""
        try:
            return int(self._file.tell())
        except (OSError, ValueError, AttributeError, NotImplementedError):
            return 0
