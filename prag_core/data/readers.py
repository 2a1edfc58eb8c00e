"""Readers of corpus files, one for each format. They yield each record, or why it cannot be used."""

from __future__ import annotations

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import IO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prag_core.config import Columns, CorpusConfig
from prag_core.data.files import shown
from prag_core.data.listing import CorpusFile
from prag_core.data.parsing import NOT_CLOSED, explain_tsv, parse_json, parse_tsv, repeated
from prag_core.errors import InputError

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256


class BadRecordError(Exception):
    """Why one record cannot be used; the caller turns it into a reject. `reason` is one word, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


# A reader yields for each record the line (or row) where it starts, and its columns or the error.
BAD_RECORD = (BadRecordError, UnicodeError)
RawRecord = tuple[int, Mapping[str, object] | BadRecordError | UnicodeError]


class _Lines:
    """The lines of a stream, with their numbers; a record whose lines exceed `limit` bytes together is an error.

    This is an iterator and not a generator, because it continues after an error. So do `map` and `csv.reader` over it.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._number = 0
        self._record: list[bytes] = []
        self._record_bytes = 0
        self._given_back: deque[bytes] = deque()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        line = self._given_back.popleft() if self._given_back else self._stream.readline(self._limit + 2)
        if not line:
            raise StopIteration
        self._number += 1
        self._record_bytes += len(line)
        # The rest of a line over the limit is counted but not kept.
        while not line.endswith(b"\n") and (rest := self._stream.readline(_CHUNK_BYTES)):
            self._record_bytes += len(rest)
            line = rest
        where = f"; it runs on to line {self._number}, is a quote never closed?" if self._record else ""
        _check_size(self._record_bytes - len(line) + len(line.rstrip(b"\r\n")), self._limit, where)
        if self._number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        self._record.append(line)
        return line

    def start_record(self) -> int:
        """Begin a record; return the number of its first line, which comes next."""
        self._record, self._record_bytes = [], 0
        return self._number + 1

    def keep_first_only(self) -> None:
        """Drop all lines of the current record but the first, so that they are read again."""
        self._given_back.extendleft(reversed(self._record[1:]))
        self._number -= len(self._record) - 1


def read_jsonl(stream: IO[bytes], file: CorpusFile, config: CorpusConfig) -> Iterator[RawRecord]:
    """Read JSON Lines, one object a line, and ignore blank lines."""
    lines = _Lines(stream, config.max_record_bytes)
    rows = map(_parse_json, lines)
    while True:
        number = lines.start_record()
        try:
            if (row := next(rows)) is not None:
                yield number, row
        except StopIteration:
            return
        except BAD_RECORD as bad:
            yield number, bad


def _parse_json(line: bytes) -> Mapping[str, object] | None:
    """Return the object in a line; None for a blank line."""
    text = line.decode().strip()
    try:
        value = parse_json(text) if text else None
    except json.JSONDecodeError as error:
        raise BadRecordError("invalid_json", f"{error.msg} at column {error.colno}") from None
    except ValueError as error:  # such as a number of 5,000 digits, or 100,000 nested brackets
        raise BadRecordError("invalid_json", str(error)) from None
    if text and not isinstance(value, dict):
        detail = f"the line holds a JSON {type(value).__name__}; each line must hold one object"
        raise BadRecordError("not_an_object", detail)
    return cast("dict[str, object] | None", value)


def read_tsv(stream: IO[bytes], file: CorpusFile, config: CorpusConfig) -> Iterator[RawRecord]:
    """Read a TSV file with a header line, such as DPR's `psgs_w100.tsv`. Each line is a row.

    With `corpus.multiline_fields`, a quoted field may go on in the next line.

    Raises:
        InputError: when the header cannot be read, lacks a column that is configured, or has a column twice.
    """
    lines = _Lines(stream, config.max_record_bytes)
    # Bytes that are not UTF-8 become lone surrogates, so that csv continues. Later they make the record a reject.
    texts = map(partial(str, encoding="utf-8", errors="surrogateescape"), lines)
    rows = _MultilineRows(texts, lines, config) if config.multiline_fields else map(_parse_tsv, texts)
    try:
        header = [name.strip() for name in next(rows, [])]
    except BadRecordError as error:
        raise InputError(
            f"{file.url}: its first line is not a TSV header: {error}", "name the columns there, or set corpus.format"
        ) from None
    _check_columns(header, file, config)
    while True:
        number = lines.start_record()
        try:
            row = next(rows)
        except StopIteration:
            return
        except BadRecordError as bad:
            yield number, bad
        else:
            if len(header) > 1 and [name.strip() for name in row] == header:
                yield number, BadRecordError("invalid_tsv", "the row is the header once more; were files joined?")
            elif len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif "".join(row).strip() or len(row) > 1:  # a blank line is not a record
                detail = f"the row has {len(row)} fields, the header has {len(header)}"
                yield number, BadRecordError("invalid_tsv", detail)


def _parse_tsv(line: str) -> list[str]:
    try:
        return parse_tsv(line)
    except ValueError as error:
        hint = "; if fields go on in the next line, set corpus.multiline_fields" if NOT_CLOSED in str(error) else ""
        raise BadRecordError("invalid_tsv", f"{error}{hint}") from None


class _MultilineRows:
    """The rows of TSV lines in which a quoted field may go on in the next line.

    This is an iterator and not a generator, because it continues after an error.
    """

    def __init__(self, texts: Iterator[str], lines: _Lines, config: CorpusConfig) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), config.max_record_bytes))
        self._rows = csv.reader(texts, delimiter="\t", strict=True)
        self._lines = lines

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        try:
            return next(self._rows)
        except csv.Error as error:
            # A stray quote may have swallowed the records after it: reject the first line and read the others again.
            self._lines.keep_first_only()
            raise BadRecordError("invalid_tsv", explain_tsv(error)) from None


def read_parquet(stream: IO[bytes], file: CorpusFile, config: CorpusConfig) -> Iterator[RawRecord]:
    """Read the configured columns of a Parquet file.

    Raises:
        InputError: when it lacks a column that is configured, has a column twice, or a column of values that cannot be
            texts.
    """
    metadata = pq.read_metadata(stream)
    schema = metadata.schema.to_arrow_schema()
    there = schema.names
    _check_columns(there, file, config)
    columns = config.columns
    wanted = (columns.id, columns.title, columns.text, columns.access)
    names = [name for name in wanted if name is not None and name in there]
    for name in names:
        _check_type(name, schema.field(name).type, file, columns)
    # A small file may hold one long text a million times, also in a list: as a dictionary it is in memory once.
    leaves = [metadata.schema.column(place) for place in range(len(metadata.schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    table = pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True, read_dictionary=texts)
    number = 0
    for batch in table.iter_batches(_PARQUET_ROWS, columns=names):
        for row in range(batch.num_rows):
            number += 1
            try:
                cells = {name: batch.column(name)[row] for name in names}
                # Lists are measured before Python holds their texts, each as often as it comes.
                size = sum(_list_bytes(cell) for cell in cells.values() if isinstance(cell, pa.ListScalar))
                _check_size(size, config.max_record_bytes)
                values = {name: cell.as_py() for name, cell in cells.items()}
                size += sum(len(value.encode()) for value in values.values() if isinstance(value, str))
                _check_size(size, config.max_record_bytes)
                yield number, values
            except BAD_RECORD as bad:
                yield number, bad
            except (ValueError, OverflowError) as error:  # such as a date after the year 9999
                yield number, BadRecordError("wrong_type", f"a value cannot be read: {error}")


def _check_type(name: str, kind: pa.DataType, file: CorpusFile, columns: Columns) -> None:
    """Refuse a column whose values can be neither texts nor tags: a page of few bytes may hold billions of numbers."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    is_tags = name == columns.access and types.is_list(kind) and _is_text(kind.value_type)
    if (types.is_nested(kind) and not is_tags) or types.is_fixed_size_binary(kind):
        raise InputError(
            f"{file.url}: its column {name!r} holds {shown(str(kind))[:100]}, which is no text",
            "set corpus.columns to columns of texts; that of access tags may hold lists of texts",
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _list_bytes(cell: pa.ListScalar) -> int:
    """Return how many bytes the texts of a list have, which are read as a dictionary, with one more for each."""
    tags = cell.values
    if tags is None:
        return 0
    lengths = pc.take(pc.binary_length(tags.dictionary), tags.indices)
    return len(tags) + (pc.sum(lengths).as_py() or 0)


def read_plain_text(stream: IO[bytes], file: CorpusFile, config: CorpusConfig) -> Iterator[RawRecord]:
    """Read a text file as one record; its id is the file's path and its title the file's name."""
    name = file.label.removesuffix(".gz")
    data = stream.read(config.max_record_bytes + 1)
    try:
        rest = sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))
        _check_size(len(data) + rest, config.max_record_bytes)
        columns = config.columns
        text = data.decode("utf-8-sig")
        yield 1, {columns.id: name, columns.title: PurePosixPath(name).stem, columns.text: text}
    except BAD_RECORD as bad:
        yield 1, bad


def _check_columns(there: Sequence[str], file: CorpusFile, config: CorpusConfig) -> None:
    if config.columns.text not in there:
        raise InputError(
            f"{file.url}: has no column {config.columns.text!r}; it has {quote_names(there)}",
            "set corpus.columns.text to the column that holds the texts",
        )
    for field in ("id", "title"):
        name = getattr(config.columns, field)
        # Without the usual columns, ids are made and titles are empty. But who names another column expects it.
        if name not in there and name != Columns.model_fields[field].default:
            raise InputError(
                f"{file.url}: has no column {name!r}; it has {quote_names(there)}",
                f"set corpus.columns.{field} to the column that holds the {field}s, or leave it out",
            )
    if twice := repeated([name for name in there if name]):
        raise InputError(
            f"{file.url}: has the column {twice[0]!r} more than once", "rename one of them, so that it is clear which"
        )


def _check_size(size: int, limit: int, where: str = "") -> None:
    if size > limit:
        raise BadRecordError("too_long", f"{size:,} bytes, over corpus.max_record_bytes = {limit:,}{where}")


def quote_names(names: Mapping[str, object] | Sequence[str]) -> str:
    """Return names for a message: quoted, cut to 50 characters, the first twenty of them."""
    shown = ", ".join(repr(name[:50]) for name in list(names)[:20])
    return f"{shown}, …" if len(names) > 20 else shown or "none"
