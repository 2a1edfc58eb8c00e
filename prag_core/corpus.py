"""From corpus files to passages: find the files, read their records, split long texts, merge equal ones.

Files are JSON Lines, TSV (as DPR's `psgs_w100.tsv`), Parquet or plain text, gzipped or not, at any fsspec URL.
Nothing vanishes: every record comes out as one or more `Piece`s, or as exactly one `Reject`.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from itertools import pairwise
from pathlib import PurePosixPath
from typing import IO, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from prag_core.config import CorpusConfig
from prag_core.errors import InputError
from prag_core.identity import normalize, passage_key
from prag_core.records import Passage, Reject

Format = Literal["jsonl", "tsv", "parquet", "text"]
Reason = Literal[
    "invalid_utf8",
    "invalid_json",
    "invalid_tsv",
    "not_an_object",
    "missing_column",
    "wrong_type",
    "empty_text",
    "too_long",
    "duplicate_id",
]

_ENDINGS: Mapping[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
}
_KNOWN = ".jsonl, .ndjson, .json, .tsv, .parquet, .txt, .md (.gz may follow)"
_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256

# Control characters that are not white space: tokenizers, Lucene and C strings disagree about them.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
# Chinese and Japanese write no spaces, so each of their characters counts as a word, with the punctuation that
# follows it. Elsewhere a run of over 50 characters counts as several words, so that nothing escapes the limit.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}][、。，．！？…」』）]*|[^\s{_CJK}]{{1,50}}")
# A stop, perhaps quotes, and no small letter after the space. Possessive, and begun only where a run of stops
# begins: linear in the text, also for a million dots.
_SENTENCE_END = re.compile(r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s++[^a-z])|[。！？]++["'”’」』）)]*+""")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Nos?|Jr|Sr|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Gov|Sen|Rep|Mt|Ft|vs|etc|Inc|Ltd|Co|Corp"
    r"|Vol|Fig|pp|[^\W\d_a-z])\.$"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One record of a corpus file, or one part of a record that was too long for one passage.

    `key` names the content of the piece and `record_key` that of the whole record. `id` is the record's id, with
    `#0`, `#1`, … behind it when the record was split. `file` is the path below the configured one; `line` is the
    line where the record starts (the row in Parquet), from 1. `access` are the record's access tags.
    """

    key: str
    title: str
    text: str
    id: str
    record_id: str
    record_key: str
    file: str
    line: int
    access: tuple[str, ...] = ()


class _BadRecordError(Exception):
    """Why one record cannot be used; it never leaves this file."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


# What a reader gives for each record: where it starts, and its columns or what is wrong with it.
_BAD = (_BadRecordError, UnicodeError)
_Record = tuple[int, Mapping[str, object] | _BadRecordError | UnicodeError]


def list_files(config: CorpusConfig) -> list[str]:
    """Return the corpus files, sorted: the file itself, or what is in the folder or matches the glob.

    In folders and globs, hidden files (a name on the way that starts with `.` or `_`) and files of no known
    format are left out.

    Raises:
        InputError: when nothing is there, when no file is of a known format, or when a file is empty.
    """
    try:
        fs, root = url_to_fs(config.path)
        single = fs.isfile(root)
        if single:
            found = {root: fs.info(root)}
        elif fs.isdir(root):
            found = fs.find(root, detail=True)
        else:
            found = fs.glob(root, detail=True) if has_magic(root) else {}
    except Exception as error:  # each file system has its own, and botocore's are no OSErrors
        raise InputError(
            f"{config.path}: cannot be listed: {error}", "check corpus.path and your access to it"
        ) from error
    if not found:
        raise InputError(
            f"{config.path}: no such file or folder, or nothing in it",
            "set corpus.path to a file, a folder, a glob or an fsspec URL, and check your access to it",
        )
    sizes = {
        name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name): info.get("size")
        for name, info in found.items()
        if info["type"] == "file"
    }
    if single:
        detect_format(root, config)
    shown = (p for p in sizes if not any(part.startswith((".", "_")) for part in _label(p, config).split("/")))
    files = list(sizes) if single else sorted(path for path in shown if _format_of(path, config))
    if not files:
        raise InputError(
            f"{config.path}: holds no file of a known format",
            f"name the files {_KNOWN}, or set corpus.format",
        )
    for path in files:
        if sizes[path] == 0:
            raise InputError(f"{path}: is empty", "remove it, or write it again")
    return files


def detect_format(path: str, config: CorpusConfig) -> Format:
    """Return the format of a file: the configured one, or what its name says.

    Raises:
        InputError: when neither says it.
    """
    if found := _format_of(path, config):
        return found
    raise InputError(
        f"{path}: its name has no known ending: {_KNOWN}",
        "set corpus.format to jsonl, tsv, parquet or text",
    )


def read_records(path: str, config: CorpusConfig) -> Iterator[Piece | Reject]:
    """Read one file, a record at a time: each gives its pieces in order, or one reject that says why not.

    `config.limit` is for the caller, who knows all files.

    Raises:
        InputError: when the file as a whole cannot be read: missing, a broken archive, no column of texts.
    """
    read = {"jsonl": _read_jsonl, "tsv": _read_tsv, "parquet": _read_parquet, "text": _read_text}
    reader = read[detect_format(path, config)]
    file = _label(path, config)
    try:
        with fsspec.open(path, "rb", compression="infer") as stream:
            for line, record in reader(stream, path, config):
                try:
                    if isinstance(record, _BAD):
                        raise record
                    pieces: list[Piece] | list[Reject] = _pieces(record, file, line, config)
                except _BadRecordError as bad:
                    pieces = [_reject(bad.reason, bad.detail, file, line)]
                except (UnicodeDecodeError, UnicodeEncodeError) as bad:
                    pieces = [_reject("invalid_utf8", f"at position {bad.start}: {bad.reason}", file, line)]
                yield from pieces
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        what = str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read: {what}", "the file is missing or damaged: get it again") from error


def split_text(text: str, max_words: int) -> list[str]:
    """Split a text at sentence ends into as few pieces as `max_words` allows, of about even size.

    A sentence over the limit is split between words. Each Chinese or Japanese character counts as a word.
    """
    words = [match.start() for match in _WORD.finditer(text)]
    if len(words) <= max_words:
        return [text]
    ends = (m.end() for m in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text, m.start() - 9, m.end()))
    sentences = sorted({0, len(words), *(bisect.bisect_left(words, end) for end in ends)})
    # 1. Where it may be cut, as numbers of words: at each sentence, and evenly within one over the limit.
    cuts = [0]
    for end in sentences[1:]:
        start, parts = cuts[-1], -(-(end - cuts[-1]) // max_words)
        cuts += [start + (end - start) * part // parts for part in range(1, parts + 1)]
    # 2. The lowest limit that needs no more pieces than the highest one makes the pieces even.
    longest = max(end - start for start, end in pairwise(cuts))
    fewest = len(_fill(cuts, max_words))
    limits = range(longest, max_words + 1)
    limit = limits[bisect.bisect_left(limits, True, key=lambda limit: len(_fill(cuts, limit)) <= fewest)]
    bounds = [*(words[start] for start in _fill(cuts, limit)), len(text)]
    return [text[start:end].strip() for start, end in pairwise(bounds)]


def resolve_ids(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Reject]]:
    """Settle what one record id stands for, given all pieces that came under it, in any order.

    The record that is first by file and line decides. Records of the same content stay, to be merged with it;
    records of another content are rejected.
    """
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.line, piece.id))
    first = ordered[0]
    kept = [piece for piece in ordered if piece.record_key == first.record_key]
    refused = sorted({(piece.file, piece.line) for piece in ordered if piece.record_key != first.record_key})
    detail = f"id {first.record_id!r} stands for another text at {first.file}:{first.line}, which is kept"
    return kept, [_reject("duplicate_id", detail, file, line) for file, line in refused]


def merge_pieces(pieces: Sequence[Piece]) -> Passage:
    """Make one passage of all pieces of one key, in any order; its sources are all their ids.

    Who may read one of them may read the passage: it is public when one of them is.
    """
    first = min(pieces, key=lambda piece: (piece.id, piece.file, piece.line))
    public = any(not piece.access for piece in pieces)
    tags = () if public else tuple(sorted({tag for piece in pieces for tag in piece.access}))
    return Passage(first.key, first.title, first.text, tuple(sorted({piece.id for piece in pieces})), tags)


class _Lines:
    """The lines of a stream, counted; all lines of a record together stay within `limit` bytes.

    An iterator, not a generator: it goes on after an error, and so do `map` and `csv.reader` on top of it.
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
        # A line over the limit is only counted, to its end.
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
        """Return the number of the line that comes next, with which a record starts."""
        self._record, self._record_bytes = [], 0
        return self._number + 1

    def keep_first_only(self) -> None:
        """Take back all lines of this record but its first: they are to be read again."""
        self._given_back.extendleft(reversed(self._record[1:]))
        self._number -= len(self._record) - 1


def _read_jsonl(stream: IO[bytes], path: str, config: CorpusConfig) -> Iterator[_Record]:
    lines = _Lines(stream, config.max_record_bytes)
    rows = map(_parse_json, lines)
    while True:
        number = lines.start_record()
        try:
            if (row := next(rows)) is not None:
                yield number, row
        except StopIteration:
            return
        except _BAD as bad:
            yield number, bad


def _parse_json(line: bytes) -> Mapping[str, object] | None:
    """Return the object in a line; None for a blank one."""
    text = line.decode().strip()
    try:
        value = json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise _BadRecordError("invalid_json", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise _BadRecordError("invalid_json", str(error)) from None
    if text and not isinstance(value, dict):
        detail = f"the line holds a JSON {type(value).__name__}; each line must hold one object"
        raise _BadRecordError("not_an_object", detail)
    return cast("dict[str, object] | None", value)


def _read_tsv(stream: IO[bytes], path: str, config: CorpusConfig) -> Iterator[_Record]:
    # Python limits a cell to 131,072 characters, for the whole process; here `_Lines` holds the limit instead.
    csv.field_size_limit(max(csv.field_size_limit(), config.max_record_bytes))
    lines = _Lines(stream, config.max_record_bytes)
    # Bytes that are not UTF-8 become lone surrogates, which `_string` refuses: csv goes on with the next row.
    texts = map(partial(str, encoding="utf-8", errors="surrogateescape"), lines)
    rows = csv.reader(texts, delimiter="\t", strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except (csv.Error, _BadRecordError) as error:
        raise InputError(
            f"{path}: its first line is not a TSV header: {error}", "name the columns there, or set corpus.format"
        ) from None
    _require_text_column(header, path, config)
    while True:
        number = lines.start_record()
        try:
            row = next(rows)
        except StopIteration:
            return
        except _BadRecordError as bad:
            yield number, bad
        except csv.Error as error:
            # Perhaps a stray quote took the next records in: only its own line is lost.
            lines.keep_first_only()
            detail = f"{error}; a field with a double quote must be quoted, its quotes doubled"
            yield number, _BadRecordError("invalid_tsv", detail)
        else:
            if len(row) == len(header):
                yield number, dict(zip(header, row, strict=True))
            elif "".join(row).strip() or len(row) > 1:  # a blank line is no record
                detail = f"the row has {len(row)} fields, the header has {len(header)}"
                yield number, _BadRecordError("invalid_tsv", detail)


def _read_parquet(stream: IO[bytes], path: str, config: CorpusConfig) -> Iterator[_Record]:
    table = pq.ParquetFile(stream)
    there = table.schema_arrow.names
    _require_text_column(there, path, config)
    columns = config.columns
    wanted = (columns.id, columns.title, columns.text, columns.access)
    names = [name for name in wanted if name is not None and name in there]
    number = 0
    for batch in table.iter_batches(_PARQUET_ROWS, columns=names):
        for row in range(batch.num_rows):
            number += 1
            try:
                values = {name: batch.column(name)[row].as_py() for name in names}
                size = sum(len(value.encode()) for value in values.values() if isinstance(value, str))
                _check_size(size, config.max_record_bytes)
                yield number, values
            except _BAD as bad:
                yield number, bad


def _read_text(stream: IO[bytes], path: str, config: CorpusConfig) -> Iterator[_Record]:
    name = _label(path, config).removesuffix(".gz")
    data = stream.read(config.max_record_bytes + 1)
    try:
        rest = sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))
        _check_size(len(data) + rest, config.max_record_bytes)
        columns = config.columns
        text = data.decode("utf-8-sig")
        yield 1, {columns.id: name, columns.title: PurePosixPath(name).stem, columns.text: text}
    except _BAD as bad:
        yield 1, bad


def _pieces(record: Mapping[str, object], file: str, line: int, config: CorpusConfig) -> list[Piece]:
    columns = config.columns
    if columns.text not in record:
        detail = f"no column {columns.text!r}; there are {_some(record)}; corpus.columns.text names it"
        raise _BadRecordError("missing_column", detail)
    record_id = _string(record, columns.id, numbers=True).strip() or f"{file.removesuffix('.gz')}:{line}"
    title = normalize(_string(record, columns.title, numbers=True))
    text = _string(record, columns.text, numbers=False).strip()
    if not text:
        raise _BadRecordError("empty_text", f"column {columns.text!r} holds no text")
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
    """Return a column's text without control characters; nothing there is the empty string."""
    value = record.get(column)
    if value is None:
        return ""
    if numbers and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise _BadRecordError("wrong_type", f"column {column!r} holds a {type(value).__name__}, not a string")
    value.encode()  # refuses a lone surrogate, which JSON can spell and nothing can store
    return _CONTROL.sub("", value)


def _tags(record: Mapping[str, object], column: str | None) -> tuple[str, ...]:
    """Return a record's access tags. What cannot be read as tags is never taken for public."""
    if column is None:
        return ()
    if column not in record:
        raise _BadRecordError("missing_column", f"no column {column!r}, which corpus.columns.access names")
    value = record[column]
    tags = [] if value in (None, "") else value.split(",") if isinstance(value, str) else value
    if not isinstance(tags, list):
        raise _BadRecordError("wrong_type", f"column {column!r} holds a {type(value).__name__}, not a list of tags")
    cleaned = [_string({column: tag}, column, numbers=False).strip() for tag in tags]
    if "" in cleaned:
        raise _BadRecordError("wrong_type", f"column {column!r} holds an empty tag")
    return tuple(sorted(set(cleaned)))


def _fill(cuts: Sequence[int], limit: int) -> list[int]:
    """Return the starts of the pieces when each takes in all that `limit` allows."""
    starts = [0]
    for start, end in pairwise(cuts):
        if end - starts[-1] > limit:
            starts.append(start)
    return starts


def _label(path: str, config: CorpusConfig) -> str:
    """Name a file by its path below `corpus.path`: ids made of it stay when the corpus moves."""
    root = url_to_fs(config.path)[1]
    if has_magic(root):
        root = re.split(r"[*?\[]", root, maxsplit=1)[0].rpartition("/")[0]
    full, folder = url_to_fs(path)[1], root.rstrip("/") + "/"
    return full.removeprefix(folder) if full.startswith(folder) else PurePosixPath(full).name


def _format_of(path: str, config: CorpusConfig) -> Format | None:
    if config.format != "auto":
        return config.format
    name = path.lower().removesuffix(".gz")
    return next((form for form, endings in _ENDINGS.items() if name.endswith(endings)), None)


def _require_text_column(there: Sequence[str], path: str, config: CorpusConfig) -> None:
    if config.columns.text not in there:
        raise InputError(
            f"{path}: has no column {config.columns.text!r}; it has {_some(there)}",
            "set corpus.columns.text to the column that holds the texts",
        )


def _check_size(size: int, limit: int, where: str = "") -> None:
    if size > limit:
        raise _BadRecordError("too_long", f"{size:,} bytes, over corpus.max_record_bytes = {limit:,}{where}")


def _some(names: Mapping[str, object] | Sequence[str]) -> str:
    shown = ", ".join(repr(name[:50]) for name in list(names)[:20])
    return f"{shown}, …" if len(names) > 20 else shown or "none"


def _reject(reason: Reason, detail: str, file: str, line: int) -> Reject:
    return Reject("corpus", reason, detail, f"{file}:{line}")
