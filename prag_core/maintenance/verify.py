"""Checking a store: whether each object is there, and is what it was when it was written."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.errors import AdapterError, NotFiniteAdapterError, PragError, StoreError, UnreachableError
from prag_core.identity import checksum, is_intact
from prag_core.maintenance.inventory import RECORDS, Finding, Kind, error_text, kind_of, names_of
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, from_dict, from_table, schema
from prag_core.retrieval.archive import StoredIndex, checksum_stream
from prag_core.store.objects import Store
from prag_core.store.runs import LEASE, read_lease
from prag_core.store.snapshot import CURRENT, PINS, Snapshot, pinned

if TYPE_CHECKING:
    from prag_core.store.adapters import AdapterStore


# A ledger row and the ledger part that it stands in.
ROWS = pa.schema([*schema(LedgerRow), pa.field("part", pa.string())])


def check_references(objects: Iterable[str], snapshots: Sequence[Snapshot], serving: str | None) -> list[Finding]:
    """Find what the snapshots name and the store lacks. `objects` are the names of all that there are."""
    there = set(objects)
    named: dict[str, list[str]] = {}
    for snapshot in snapshots:
        for name in names_of(snapshot):
            named.setdefault(name, []).append(snapshot.id)
    findings = [
        Finding(name, "missing", f"snapshot {ids[-1]} names it")
        for name, ids in sorted(named.items())
        if name not in there
    ]
    if (snapshots or CURRENT in there) and serving not in {snapshot.id for snapshot in snapshots}:
        # Either may be the damaged one: what CURRENT says, or the snapshot that it names.
        kind: Kind = "not_readable" if CURRENT in there else "missing"
        findings.append(Finding(CURRENT, kind, f"names {serving}, which is no readable snapshot" if serving else ""))
        document = f"snapshots/{serving}.json"
        if serving and document not in there:
            findings.append(Finding(document, "missing", f"{CURRENT} names it", repairable=False))
    return findings


def check_singles(store: Store, snapshots: Sequence[Snapshot]) -> list[Finding]:
    """Check the objects of which there is one: `PINS`, and the lease.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    findings = []
    try:
        unknown = sorted({*pinned(store)} - {snapshot.id for snapshot in snapshots})
        if unknown:  # either may be the damaged one: what PINS says, or the snapshot that it names
            findings.append(Finding(PINS, "not_readable", f"names {unknown[0]}, which is no readable snapshot"))
            gone = [f"snapshots/{id}.json" for id in unknown if not store.exists(f"snapshots/{id}.json")]
            findings += [Finding(name, "missing", f"{PINS} names it", repairable=False) for name in gone]
    except UnreachableError:
        raise
    except (StoreError, TypeError) as error:
        findings.append(Finding(PINS, "not_readable", error_text(error), repairable=False))
    try:
        read_lease(store)
    except UnreachableError:
        raise
    except StoreError as error:
        findings.append(Finding(LEASE, "not_readable", error_text(error)))
    return findings


# ---- everything but shards


def is_checkable(name: str) -> bool:
    """Whether `check_object` knows what an object should hold."""
    kind, base = kind_of(name), posixpath.basename(name)
    if kind in RECORDS:
        return name.endswith((".parquet", "manifest.json"))
    if kind == "starts":  # beside one may lie a note of the warm-up that made it, which nothing reads
        return name.endswith(".safetensors")
    return kind == "compactions" or base in ("index.json", "recipe.json", "inputs.json")


def check_object(store: Store, name: str, full: bool) -> list[Finding]:
    """Check one Parquet part, or one of the documents and starts that `is_checkable` knows.

    `full` reads every byte of it; otherwise a part's footer and an archive's size. A ledger part is always read in
    full: all else depends on it.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    kind = kind_of(name)
    try:
        if name.endswith(".parquet"):
            return _check_part(store, name, full or kind == "ledger")
        if kind == "corpus":
            return _check_manifest(store, name)
        if kind == "indexes":
            return _check_index(store, name, full)
        if kind == "recipes":
            _check_recipe(store, name)
        elif kind in ("compactions", "runs"):
            _intact(store, name)
        elif full:
            from prag_core.store.adapters import get_start  # torch, which workers that check parts do without

            get_start(store, posixpath.basename(name).removesuffix(".safetensors"))
    except UnreachableError:
        raise
    except (PragError, pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [Finding(name, "not_readable", error_text(error))]
    return []


def _check_part(store: Store, name: str, full: bool) -> list[Finding]:
    if not full:
        with store.open(name) as stream:
            pq.read_schema(stream)
        return []
    data = store.get(name)
    found = f"part-{checksum(data)}.parquet"
    if found != posixpath.basename(name):
        swapped = store.exists(posixpath.join(posixpath.dirname(name), found))
        return [
            Finding(name, "swapped", f"holds {found}", size_bytes=len(data))
            if swapped
            else Finding(name, "checksum", f"{len(data)} bytes that are not those it was named by")
        ]
    columns = schema(RECORDS[kind_of(name)]).names
    pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False).select(columns)
    return []


def _check_manifest(store: Store, name: str) -> list[Finding]:
    document = _intact(store, name)
    missing = [part for part in document["parts"] if not store.exists(part)]
    return [Finding(part, "missing", f"{name} names it") for part in missing]


def _check_index(store: Store, name: str, full: bool) -> list[Finding]:
    stored = from_dict(StoredIndex, _intact(store, name))
    archive = f"{posixpath.dirname(name)}/{stored.archive_name}"
    size = store.size(archive)
    if size is None:
        return [Finding(archive, "missing", f"{name} names it")]
    if size != stored.size_bytes:
        return [Finding(archive, "size", f"{size} bytes instead of {stored.size_bytes}", size_bytes=size)]
    if full:
        with store.open(archive) as stream:
            if checksum_stream(stream) != stored.checksum:
                return [Finding(archive, "checksum", f"not the bytes that {name} names", size_bytes=size)]
    return []


def _check_recipe(store: Store, name: str) -> None:
    recipe = Recipe.from_json(_intact(store, name)["recipe"])
    if recipe.fingerprint != name.split("/")[1]:
        raise ValueError(f"says it is {recipe.fingerprint}")


def _intact(store: Store, name: str) -> dict[str, Any]:
    document = store.get_json(name)
    if "seal" not in document or not is_intact(document):
        raise ValueError("altered: its seal does not fit")
    return dict(document)


def ledger_rows(store: Store, part: str) -> pa.Table:
    """Return the rows of one ledger part, each with the part's name.

    Raises:
        StoreError: when the part is missing or damaged.
    """
    table = store.get_table(LedgerRow, [part])
    return table.append_column(ROWS.field("part"), pa.repeat(pa.scalar(part), table.num_rows))


def check_shards(store: Store, rows: pa.Table, full: bool) -> list[Finding]:
    """Check the shards that ledger rows (with the columns of `ROWS`) name; all rows of a shard must be among them.

    Without `full`, a shard must be there and as long as its rows say. With it, every byte is read: the shard is what
    its name says, and each adapter has its checksum, the layout's shapes, and only finite values. Shapes are not
    checked where the recipe beside the shards is itself damaged.

    Raises:
        StoreError: when a shard cannot be read.
    """
    groups: dict[str, list[LedgerRow]] = {}
    parts_of: dict[str, set[str]] = {}
    for row, part in zip(from_table(LedgerRow, rows), rows["part"].to_pylist(), strict=True):
        groups.setdefault(row.shard, []).append(row)
        parts_of.setdefault(row.shard, set()).add(part)
    findings = []
    opened: dict[str, AdapterStore | None] = {}
    for shard in sorted(groups):
        of_shard, parts = groups[shard], tuple(sorted(parts_of[shard]))
        expected = max(row.offset + row.length for row in of_shard)
        size = store.size(shard)
        if size is None:
            findings.append(Finding(shard, "missing", f"{parts[0]} names it", _keys(of_shard), parts))
        elif size < expected:
            cut = _keys([row for row in of_shard if row.offset + row.length > size])
            detail = f"{size} bytes, its rows need {expected}"
            findings.append(Finding(shard, "size", detail, cut, parts, size_bytes=size))
        elif full:
            recipe = shard.split("/")[1]
            if recipe not in opened:
                opened[recipe] = _open(store, recipe)
            findings += _check_bytes(store, shard, of_shard, parts, opened[recipe])
    return findings


def _keys(rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    return tuple(sorted({row.key for row in rows}))


def _open(store: Store, recipe: str) -> AdapterStore | None:
    from prag_core.store.adapters import open_adapters

    try:
        return open_adapters(store, recipe)[0]
    except UnreachableError:
        raise
    except (StoreError, TypeError, KeyError, ValueError):
        return None


def _check_bytes(
    store: Store, shard: str, rows: Sequence[LedgerRow], parts: tuple[str, ...], adapters: AdapterStore | None
) -> list[Finding]:
    data = store.get(shard)
    # 1. Each adapter's bytes are those that were committed.
    altered = [row for row in rows if checksum(data[row.offset : row.offset + row.length]) != row.checksum]
    found = f"{posixpath.dirname(shard)}/{checksum(data)}.safetensors"
    if found != shard or altered:
        kind: Kind = "swapped" if found != shard and store.exists(found) else "checksum"
        where = f"of {len(altered)} of {len(rows)} adapters" if altered else "outside of its adapters"
        detail = f"holds {posixpath.basename(found)}" if kind == "swapped" else f"bytes {where} were altered"
        return [Finding(shard, kind, detail, _keys(altered), parts, size_bytes=len(data))]
    # 2. What was committed is an adapter of this recipe.
    if adapters is None:
        return []
    findings: dict[Kind, list[LedgerRow]] = {}
    details: dict[Kind, str] = {}
    for row in rows:
        try:
            _unpack(adapters, data, row)
        except AdapterError as error:
            kind = "not_finite" if isinstance(error, NotFiniteAdapterError) else "shape"
            findings.setdefault(kind, []).append(row)
            details[kind] = error.message
    return [
        Finding(shard, kind, details[kind], _keys(bad), parts, size_bytes=len(data)) for kind, bad in findings.items()
    ]


def _unpack(adapters: AdapterStore, data: bytes, row: LedgerRow) -> None:
    from prag_core.store.shard_codec import unpack_adapter

    unpack_adapter(adapters.layout, data[row.offset : row.offset + row.length], row.dtype, row.key, row.checksum)
