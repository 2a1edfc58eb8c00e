"""Corpus stage: files → passages, each once, under a version that is named by its content."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Profile
from pipelines.execution.outcomes import StageReport
from pipelines.execution.tables import group_by_columns, read_columns
from prag_core.config import CorpusConfig
from prag_core.data.corpus import Piece, merge_pieces, read_records, resolve_ids
from prag_core.data.files import list_files
from prag_core.errors import InputError
from prag_core.identity import seal
from prag_core.records import Passage, Reject, from_table, passage_table, schema
from prag_core.store.objects import Store
from prag_core.store.tables import corpus_parts, put_rejects

T = TypeVar("T")

_ROWS_PER_BLOCK = 500
# A row of this stage's first half is a piece of a record, or a reject: `reason` says which.
_PIECE_OR_REJECT = pa.schema(
    [*schema(Piece), pa.field("first", pa.bool_()), *(pa.field(n, pa.string()) for n in ("reason", "detail"))]
)


@dataclass(frozen=True)
class Corpus:
    """The passages of a corpus, as Ray Data holds them, and how they came about."""

    version: str
    passages: ray.data.Dataset
    count: int
    rejects: tuple[Reject, ...]
    report: StageReport


def ingest(config: CorpusConfig, profile: Profile, forgotten: Collection[str] = ()) -> Corpus:
    """Read a corpus into passages; stores nothing.

    Each record is a reject or gives one piece or more; pieces of equal content become one passage that keeps all
    their ids. Passages whose keys are `forgotten` are left out and counted.

    Raises:
        InputError: when a file cannot be read at all, or no record is found.
    """
    begun = time.perf_counter()
    files = list_files(config)
    # A limit counts records over all files, in order, so one task reads them all then.
    groups = [files] if config.limit else [[file] for file in files]
    rows = (
        ray.data.from_items([{"files": group} for group in groups], override_num_blocks=len(groups))
        .map_batches(_read, batch_size=1, batch_format="pyarrow", fn_kwargs={"config": config.model_dump()})
        .materialize()
    )
    blocks = profile.blocks(rows.count())
    resolved = (
        group_by_columns(rows, ["record_id"], blocks)
        .map_batches(_resolve_ids, batch_size=None, batch_format="pyarrow")
        .materialize()
    )
    records = sum(_count_records(batch) for batch in _batches(rows, ["first", "reason"]))
    if records == 0:
        raise InputError(f"corpus.path = {config.path!r}: holds no records", "name a corpus with at least one passage")
    rejects = _bad_rows(resolved)
    counts = resolved.map_batches(_count, batch_size=None, batch_format="pyarrow").take_all()
    pieces, accepted = (sum(row[name] for row in counts) for name in ("pieces", "records"))
    merged = (
        group_by_columns(resolved.map_batches(_pieces_only, batch_format="pyarrow"), ["key"], blocks)
        .map_batches(_merge, batch_size=None, batch_format="pyarrow")
        .materialize()
    )
    unique = merged.count()
    if forgotten:
        arguments = {"forgotten": sorted(forgotten)}
        merged = merged.map_batches(_without, batch_format="pyarrow", fn_kwargs=arguments).materialize()
    digests = merged.map_batches(_digest, batch_format="pyarrow").take_all()
    count = sum(row["count"] for row in digests)
    version = f"{sum(int(row['digest'], 16) for row in digests) % 2**64:016x}"
    report = StageReport(
        stage="corpus",
        taken=records,
        done=accepted,
        earlier=0,
        rejected=dict(Counter(reject.reason for reject in rejects)),
        seconds=time.perf_counter() - begun,
        extra={
            "pieces": pieces,
            "passages": count,
            "duplicates": pieces - unique,
            "forgotten": unique - count,
        },
    )
    return Corpus(version, merged, count, tuple(rejects), report)


def store_corpus(store: Store, corpus: Corpus, run: str) -> None:
    """Store a corpus version, unless it is there: its parts, and the manifest last."""
    put_rejects(store, run, corpus.rejects)
    manifest = f"corpus/{corpus.version}/manifest.json"
    if store.exists(manifest):
        return
    parts = corpus.passages.map_batches(
        _write_part, batch_size=None, batch_format="pyarrow", fn_args=(store, f"corpus/{corpus.version}")
    ).take_all()
    names = sorted(row["part"] for row in parts if row["part"])
    document = {"passages": corpus.count, "parts": names, "report": asdict(corpus.report)}
    store.put_json(manifest, seal(document))


def stored_passages(
    store: Store, version: str, partitions: int, columns: Sequence[str] = tuple(schema(Passage).names)
) -> ray.data.Dataset:
    """Return the passages of a stored corpus version; they are read anew wherever they are needed."""
    parts = corpus_parts(store, version)
    if not parts:
        return ray.data.from_arrow(schema(Passage).empty_table().select(columns))
    return read_columns(store, parts, list(columns), partitions)


def _read(table: pa.Table, config: dict[str, Any]) -> Iterator[pa.Table]:
    settings = CorpusConfig.model_validate(config)
    files = table["files"].to_pylist()[0]
    seen: set[tuple[str, int]] = set()
    rows: list[dict[str, Any]] = []
    records = 0
    for item in itertools.chain.from_iterable(read_records(file, settings) for file in files):
        # Pieces of one record follow each other, so only the last record's place has to be known.
        place = (item.file, item.line) if isinstance(item, Piece) else None
        first = place is None or place not in seen
        if first:
            records += 1
            seen = {place} if place else set()
            if settings.limit and records > settings.limit:
                break
        rows.append(_row(item, first))
        if len(rows) >= _ROWS_PER_BLOCK:
            yield pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)
            rows = []
    yield pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)


def _row(item: Piece | Reject, first: bool) -> dict[str, Any]:
    if isinstance(item, Piece):
        return {**asdict(item), "first": first, "reason": "", "detail": ""}
    blank = {**dict.fromkeys(("key", "title", "text", "id", "record_key"), ""), "access": []}
    # A reject's own place is its record id, so that no two of them meet in one group.
    return {
        **blank,
        "record_id": f"\0{item.source}",
        "file": item.source,
        "line": 0,
        "first": True,
        "reason": item.reason,
        "detail": item.detail,
    }


def _resolve_ids(table: pa.Table) -> pa.Table:
    rejects = table.filter(pc.not_equal(table["reason"], ""))
    pieces = from_table(Piece, table.filter(pc.equal(table["reason"], "")))
    rows: list[dict[str, Any]] = []
    for group in _groups(pieces, lambda piece: piece.record_id):
        kept, refused = resolve_ids(group)
        rows += [_row(piece, False) for piece in kept] + [_row(reject, True) for reject in refused]
    return pa.concat_tables([rejects, pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)])


def _pieces_only(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["reason"], "")).select(schema(Piece).names)


def _merge(table: pa.Table) -> pa.Table:
    pieces = from_table(Piece, table) if table.num_columns else []
    merged = [merge_pieces(group) for group in _groups(pieces, lambda piece: piece.key)]
    return passage_table(sorted(merged, key=lambda passage: passage.key))


def _without(table: pa.Table, forgotten: list[str]) -> pa.Table:
    if not table.num_rows:
        return table
    return table.filter(pc.invert(pc.is_in(table["key"], value_set=pa.array(forgotten, pa.string()))))


def _groups(items: Iterable[T], key: Any) -> list[list[T]]:
    ordered = sorted(items, key=key)
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _digest(table: pa.Table) -> dict[str, list[Any]]:
    # A sum does not depend on order: the same passages make the same version however they are filed.
    total = sum(int(digest, 16) for digest in table["digest"].to_pylist()) if table.num_rows else 0
    return {"digest": [f"{total % 2**64:016x}"], "count": [table.num_rows]}


def _write_part(table: pa.Table, store: Store, folder: str) -> dict[str, list[str]]:
    return {"part": [store.put_table(folder, table) if table.num_rows else ""]}


def _batches(rows: ray.data.Dataset, columns: list[str]) -> Iterator[pa.Table]:
    yield from rows.select_columns(columns).iter_batches(batch_size=None, batch_format="pyarrow")


def _count_records(batch: pa.Table) -> int:
    return int(pc.sum(pc.cast(batch["first"], pa.int64())).as_py() or 0)


def _count(table: pa.Table) -> dict[str, list[int]]:
    good = table.filter(pc.equal(table["reason"], ""))
    # All pieces of a record lie in one partition, so its place is counted once.
    places = good.select(["file", "line"]).group_by(["file", "line"]).aggregate([]) if good.num_rows else good
    return {"pieces": [good.num_rows], "records": [places.num_rows]}


def _bad_rows(resolved: ray.data.Dataset) -> list[Reject]:
    rejects = []
    for batch in _batches(resolved, ["reason", "detail", "file"]):
        bad = batch.filter(pc.not_equal(batch["reason"], ""))
        rejects += [
            Reject(stage="corpus", reason=row["reason"], detail=row["detail"], source=row["file"])
            for row in bad.to_pylist()
        ]
    return sorted(rejects, key=lambda reject: reject.source)
