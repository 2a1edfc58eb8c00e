"""Corpus stage: files → passages, each once, under a version that is named by its content."""

from __future__ import annotations

import itertools
import pickle
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
from pipelines.execution.tables import drop_keys, group_by_columns, iter_blocks, map_blocks, read_columns
from prag_core.config import CorpusConfig, StorageConfig
from prag_core.data.corpus import Piece, merge_pieces, read_records, resolve_ids
from prag_core.data.listing import list_files
from prag_core.errors import InputError
from prag_core.identity import seal
from prag_core.records import Passage, Reject, from_table, passage_table, schema
from prag_core.store.objects import Store
from prag_core.store.tables import corpus_parts, put_rejects

T = TypeVar("T")

_ROWS_PER_BLOCK = 500
# A row of the first half of this stage is a piece of a record, or a reject if `reason` is not empty. If `is_name`, it
# has no text: it brings the name of a part of a split record to the records that have this name as their id.
_PIECE_OR_REJECT = pa.schema(
    [
        *schema(Piece),
        pa.field("first", pa.bool_()),
        *(pa.field(n, pa.string()) for n in ("reason", "detail")),
        pa.field("is_name", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Corpus:
    """The passages of a corpus as a dataset, their number and version, and what was rejected on the way."""

    version: str
    passages: ray.data.Dataset
    count: int
    rejects: tuple[Reject, ...]
    report: StageReport


def ingest(
    config: CorpusConfig,
    profile: Profile,
    tombstones: Collection[str] = (),
    storage: StorageConfig | None = None,
) -> Corpus:
    """Read a corpus into passages; stores nothing. `storage` says how to reach servers.

    Each record is a reject or gives at least one piece. Pieces of equal content become one passage with all their
    ids. Passages whose keys are among `tombstones` are left out and counted.

    Raises:
        InputError: when a file cannot be read at all, or no record is found.
    """
    begun = time.perf_counter()
    listing = list_files(config, storage)
    # A limit counts records over all files in order, so one task reads them all.
    groups = [listing.files] if config.limit else [(file,) for file in listing.files]
    # Pickled, because a name of a file may hold what Arrow cannot: bytes that are not UTF-8.
    items = ray.data.from_items([{"files": pickle.dumps(group)} for group in groups], override_num_blocks=len(groups))
    rows = map_blocks(items, _read, config=config, storage=storage).materialize()
    blocks = profile.blocks(rows.count())
    resolved = map_blocks(group_by_columns(rows, ["record_id"], blocks), _resolve_ids).materialize()
    records = sum(_count_records(block) for block in iter_blocks(rows.select_columns(["first"])))
    if records == 0:
        raise InputError(f"corpus.path = {config.path!r}: holds no records", "name a corpus with at least one passage")
    rejects = _rejects(resolved)
    counts = map_blocks(resolved, _count).take_all()
    pieces, accepted = (sum(row[name] for row in counts) for name in ("pieces", "records"))
    by_key = group_by_columns(map_blocks(resolved, _pieces_only), ["key"], blocks)
    merged = map_blocks(by_key, _merge).materialize()
    unique = merged.count()
    if tombstones:
        merged = map_blocks(merged, drop_keys, keys=sorted(tombstones)).materialize()
    digests = map_blocks(merged, _digest).take_all()
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
            "files": len(listing.files),
            "files_left_out": {item.reason: item.count for item in listing.left_out},
            "pieces": pieces,
            "passages": count,
            "duplicates": pieces - unique,
            "forgotten": unique - count,
        },
    )
    return Corpus(version, merged, count, tuple(rejects), report)


def store_corpus(store: Store, corpus: Corpus, run: str) -> None:
    """Store a corpus version, unless the store has it: first its parts, then the manifest that commits it."""
    put_rejects(store, run, corpus.rejects)
    manifest = f"corpus/{corpus.version}/manifest.json"
    if store.exists(manifest):
        return
    parts = map_blocks(corpus.passages, _write_part, store=store, folder=f"corpus/{corpus.version}").take_all()
    names = sorted(row["part"] for row in parts)
    document = {"passages": corpus.count, "parts": names, "report": asdict(corpus.report)}
    store.put_json(manifest, seal(document))


def stored_passages(
    store: Store, version: str, partitions: int, columns: Sequence[str] = tuple(schema(Passage).names)
) -> ray.data.Dataset:
    """Return the passages of a stored corpus version; each pipeline that uses them reads them from the store again."""
    parts = corpus_parts(store, version)
    if not parts:
        return ray.data.from_arrow(schema(Passage).empty_table().select(columns))
    return read_columns(store, parts, list(columns), partitions)


def _read(table: pa.Table, config: CorpusConfig, storage: StorageConfig | None) -> Iterator[pa.Table]:
    files = itertools.chain.from_iterable(map(pickle.loads, table["files"].to_pylist()))
    seen: set[tuple[str, int]] = set()
    rows: list[dict[str, Any]] = []
    records = 0
    for item in itertools.chain.from_iterable(read_records(file, config, storage) for file in files):
        # Pieces of one record follow each other, so only the last record's place has to be known.
        place = (item.file, item.line) if isinstance(item, Piece) else None
        first = place is None or place not in seen
        if first:
            records += 1
            seen = {place} if place else set()
            if config.limit and records > config.limit:
                break
        rows.append(_row(item, first))
        if isinstance(item, Piece) and item.id != item.record_id:
            blank = {"title": "", "text": "", "access": []}
            rows.append({**_row(item, False), **blank, "record_id": item.id, "is_name": True})
        if len(rows) >= _ROWS_PER_BLOCK:
            yield pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)
            rows = []
    yield pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)


def _row(item: Piece | Reject, first: bool) -> dict[str, Any]:
    if isinstance(item, Piece):
        return {**asdict(item), "first": first, "reason": "", "detail": "", "is_name": False}
    blank = {**dict.fromkeys(("key", "title", "text", "id", "record_key"), ""), "access": []}
    # The record id of a reject is its place, so that each reject is alone in its group.
    return {
        **blank,
        "record_id": f"\0{item.source}",
        "file": item.source,
        "line": 0,
        "first": True,
        "reason": item.reason,
        "detail": item.detail,
        "is_name": False,
    }


def _resolve_ids(table: pa.Table) -> pa.Table:
    rejects = table.filter(pc.not_equal(table["reason"], ""))
    good = table.filter(pc.equal(table["reason"], ""))
    pieces = from_table(Piece, good.filter(pc.invert(good["is_name"])))
    parts: dict[str, list[Piece]] = {}
    for part in from_table(Piece, good.filter(good["is_name"])):
        parts.setdefault(part.id, []).append(part)
    rows: list[dict[str, Any]] = []
    for group in _groups(pieces, lambda piece: piece.record_id):
        kept, refused = resolve_ids(group, parts.get(group[0].record_id, ()))
        rows += [_row(piece, False) for piece in kept] + [_row(reject, True) for reject in refused]
    return pa.concat_tables([rejects, pa.Table.from_pylist(rows, schema=_PIECE_OR_REJECT)])


def _pieces_only(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["reason"], "")).select(schema(Piece).names)


def _merge(table: pa.Table) -> pa.Table:
    merged = [merge_pieces(group) for group in _groups(from_table(Piece, table), lambda piece: piece.key)]
    return passage_table(sorted(merged, key=lambda passage: passage.key))


def _groups(items: Iterable[T], key: Any) -> list[list[T]]:
    ordered = sorted(items, key=key)
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _digest(table: pa.Table) -> dict[str, list[Any]]:
    # A sum does not depend on order: the same passages have the same version in whatever order they are stored.
    total = sum(int(digest, 16) for digest in table["digest"].to_pylist())
    return {"digest": [f"{total % 2**64:016x}"], "count": [table.num_rows]}


def _write_part(table: pa.Table, store: Store, folder: str) -> dict[str, list[str]]:
    return {"part": [store.put_table(folder, table)]}


def _count_records(block: pa.Table) -> int:
    return int(pc.sum(pc.cast(block["first"], pa.int64())).as_py() or 0)


def _count(table: pa.Table) -> dict[str, list[int]]:
    good = table.filter(pc.equal(table["reason"], ""))
    # All pieces of a record are in one block, so each record is counted once.
    return {"pieces": [good.num_rows], "records": [good.group_by(["file", "line"]).aggregate([]).num_rows]}


def _rejects(resolved: ray.data.Dataset) -> list[Reject]:
    blocks = iter_blocks(resolved.select_columns(["reason", "detail", "file"]))
    return sorted((reject for block in blocks for reject in _rejects_of(block)), key=lambda reject: reject.source)


def _rejects_of(table: pa.Table) -> list[Reject]:
    return [
        Reject(stage="corpus", reason=row["reason"], detail=row["detail"], source=row["file"])
        for row in table.filter(pc.not_equal(table["reason"], "")).to_pylist()
    ]
