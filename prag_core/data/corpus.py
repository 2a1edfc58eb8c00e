"""From corpus files to passages: read the records, split long texts, merge equal ones.

Files are JSON Lines, TSV (as DPR's `psgs_w100.tsv`), Parquet or plain text, gzipped or not, at any fsspec URL.
No record is lost: each becomes one or more `Piece`s, or exactly one `Reject`.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from prag_core.config import CorpusConfig, StorageConfig
from prag_core.data.chunking import split_text
from prag_core.data.files import open_file, open_filesystem, shown
from prag_core.data.listing import CorpusFile
from prag_core.data.readers import (
    BAD_RECORD,
    BadRecordError,
    quote_names,
    read_jsonl,
    read_parquet,
    read_plain_text,
    read_tsv,
)
from prag_core.errors import InputError
from prag_core.identity import normalize, passage_key
from prag_core.records import Passage, Reject

# Control characters that are not white space. Tokenizers, Lucene and C strings treat them differently.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
# Unicode's normal form sorts the marks of a letter in quadratic time: those of a record of 1 MB would take minutes.
_MAX_MARKS = 100
_PERHAPS_MARKS = re.compile(rf"[^\w\s\x00-\x7f]{{{_MAX_MARKS + 1},}}")


@dataclass(frozen=True, slots=True)
class Piece:
    """One record of a corpus file, or one part of a record that is too long for a passage.

    `id` is the record's id; if the record was split, followed by `#0`, `#1`, ….
    """

    key: str  # the passage key of the piece
    title: str
    text: str
    id: str
    record_id: str
    record_key: str  # the passage key of the whole record
    file: str  # the file's path below the configured one
    line: int  # the line where the record starts, or its row in Parquet, from 1
    access: tuple[str, ...] = ()


def read_records(
    file: CorpusFile, config: CorpusConfig, storage: StorageConfig | None = None
) -> Iterator[Piece | Reject]:
    """Read one file lazily; yield the pieces of each record in order, or one reject with the reason.

    `config.limit` is not applied here, because it counts the records of all files.

    Raises:
        InputError: when the file cannot be read at all: it is missing, a broken archive, or has no column of texts.
    """
    read = {"jsonl": read_jsonl, "tsv": read_tsv, "parquet": read_parquet, "text": read_plain_text}
    try:
        fs, _ = open_filesystem(config.path, storage)
        with open_file(fs, file.name, seekable=file.format == "parquet") as stream:
            for line, record in read[file.format](stream, file, config):
                try:
                    if isinstance(record, BAD_RECORD):
                        raise record
                    pieces: list[Piece] | list[Reject] = _pieces(record, file.label, line, config)
                except BadRecordError as bad:
                    pieces = [_reject(bad.reason, bad.detail, file.label, line)]
                except (UnicodeDecodeError, UnicodeEncodeError) as bad:
                    detail = f"is not UTF-8 at position {bad.start}: {bad.reason}"
                    pieces = [_reject("invalid_utf8", detail, file.label, line)]
                yield from pieces
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the names of a damaged file's columns
        what = shown(str(error)) or type(error).__name__  # it may repeat what the file holds
        raise InputError(
            f"{file.url}: cannot be read: {what}", "the file is missing or damaged: get it again"
        ) from error


def read_first_records(
    files: Sequence[CorpusFile], config: CorpusConfig, storage: StorageConfig | None = None
) -> list[Piece | Reject]:
    """Return the first record, or its reject, of the first file of each kind, as the ending of the name tells kinds.

    Raises:
        InputError: when one of these files cannot be read at all.
    """
    kinds: dict[tuple[str, str], CorpusFile] = {}
    for file in files:
        kinds.setdefault((file.format, PurePosixPath(file.label).suffix.lower()), file)
    found: list[Piece | Reject] = []
    for file in kinds.values():
        found += itertools.islice(read_records(file, config, storage), 1)
    return found


def resolve_ids(pieces: Sequence[Piece], parts: Sequence[Piece] = ()) -> tuple[list[Piece], list[Reject]]:
    """Keep one content for an id, given all pieces of the records with that id in any order.

    The first record by file and line decides. Records with the same content are kept, to be merged; records with
    other content are rejected. `parts` are pieces of other records that were split and have that id as the name of a
    part: a whole record with that id and another text is rejected, so that no two texts share a name.
    """
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.line, piece.id))
    refused: dict[tuple[str, int], str] = {}
    for piece in ordered:
        for part in parts:
            if piece.id == part.id and piece.key != part.key:
                where = f"of the record at {part.file}:{part.line}"
                refused[piece.file, piece.line] = f"id {piece.id!r} is the name of a part {where}, which is kept"
    rest = [piece for piece in ordered if (piece.file, piece.line) not in refused]
    kept = [piece for piece in rest if piece.record_key == rest[0].record_key]
    for piece in rest:
        if piece.record_key != rest[0].record_key:
            where = f"{rest[0].file}:{rest[0].line}"
            refused[piece.file, piece.line] = f"id {piece.record_id!r} has another text at {where}, which is kept"
    return kept, [_reject("duplicate_id", detail, file, line) for (file, line), detail in sorted(refused.items())]


def merge_pieces(pieces: Sequence[Piece]) -> Passage:
    """Return the passage of all pieces with one key, given in any order; its sources are all their ids.

    A user who may read one of the pieces may read the passage, so it is public if one of them is.
    """
    first = min(pieces, key=lambda piece: (piece.id, piece.file, piece.line))
    public = any(not piece.access for piece in pieces)
    tags = () if public else tuple(sorted({tag for piece in pieces for tag in piece.access}))
    return Passage(first.key, first.title, first.text, tuple(sorted({piece.id for piece in pieces})), tags)


def has_made_id(piece: Piece) -> bool:
    """Whether a record had no id of its own, so that one was made of its place."""
    return piece.record_id == _made_id(piece.file, piece.line)


def _made_id(file: str, line: int) -> str:
    return f"{file.removesuffix('.gz')}:{line}"


def _pieces(record: Mapping[str, object], file: str, line: int, config: CorpusConfig) -> list[Piece]:
    columns = config.columns
    if columns.text not in record:
        detail = f"no column {columns.text!r}; there are {quote_names(record)}; corpus.columns.text names it"
        raise BadRecordError("missing_column", detail)
    # In one line, as it is printed.
    record_id = " ".join(_string(record, columns.id, numbers=True).splitlines()).strip() or _made_id(file, line)
    title = normalize(_string(record, columns.title, numbers=True))
    text = _string(record, columns.text, numbers=False).strip()
    if not text:
        raise BadRecordError("empty_text", f"column {columns.text!r} holds no text")
    access = _tags(record, columns.access)
    texts = split_text(text, config.max_words)
    record_key = passage_key(title, text)
    if len(texts) == 1:
        return [Piece(record_key, title, text, record_id, record_id, record_key, file, line, access)]
    return [
        Piece(passage_key(title, part), title, part, f"{record_id}#{n}", record_id, record_key, file, line, access)
        for n, part in enumerate(texts)
    ]


def _string(record: Mapping[str, object], column: str, *, numbers: bool) -> str:
    """Return a column's text without control characters; a missing value is the empty string."""
    value = record.get(column)
    if value is None:
        return ""
    if numbers and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise BadRecordError("wrong_type", f"column {column!r} holds a {type(value).__name__}, not a string")
    value.encode()  # raises for a lone surrogate: JSON can spell one, but UTF-8 cannot store it
    text = _CONTROL.sub("", value)
    if any(len(marks) > _MAX_MARKS for found in _PERHAPS_MARKS.findall(text) for marks in _mark_runs(found)):
        raise BadRecordError("too_many_marks", f"column {column!r} has over {_MAX_MARKS} marks on one letter")
    return text


def _mark_runs(text: str) -> Iterator[str]:
    for is_marks, run in itertools.groupby(text, lambda letter: unicodedata.category(letter).startswith("M")):
        if is_marks:
            yield "".join(run)


def _tags(record: Mapping[str, object], column: str | None) -> tuple[str, ...]:
    """Return a record's access tags. A value that is not tags rejects the record, so it never becomes public."""
    if column is None:
        return ()
    if column not in record:
        raise BadRecordError("missing_column", f"no column {column!r}, which corpus.columns.access names")
    value = record[column]
    tags = [] if value in (None, "") else value.split(",") if isinstance(value, str) else value
    if not isinstance(tags, list):
        raise BadRecordError("wrong_type", f"column {column!r} holds a {type(value).__name__}, not a list of tags")
    cleaned = [_string({column: tag}, column, numbers=False).strip() for tag in tags]
    if "" in cleaned:
        raise BadRecordError("wrong_type", f"column {column!r} holds an empty tag")
    return tuple(sorted(set(cleaned)))


def _reject(reason: str, detail: str, file: str, line: int) -> Reject:
    return Reject("corpus", reason, detail, f"{file}:{line}")
