"""Verification: check that each object of a store exists and is unaltered. Nothing here changes the store."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.errors import AdapterError, DamagedError, NotFiniteAdapterError
from prag_core.identity import checksum
from prag_core.maintenance.inventory import RECORDS, Finding, FindingKind, error_text, names_of, object_kind
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, from_dict, from_table, schema
from prag_core.retrieval.archive import StoredIndex, checksum_stream
from prag_core.store.objects import Store
from prag_core.store.pins import PINS, pinned
from prag_core.store.runs import LEASE, read_lease
from prag_core.store.snapshot import CURRENT, Snapshot, document_name

if TYPE_CHECKING:
    from prag_core.store.adapters import AdapterStore

# A ledger row, and the ledger part that holds it.
ROWS = pa.schema([*schema(LedgerRow), pa.field("part", pa.string())])
# What parsing a damaged object may raise.
_MALFORMED = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError)


def check_references(objects: Iterable[str], snapshots: Sequence[Snapshot], serving: str | None) -> list[Finding]:
    """Return a finding for each object that a snapshot names and the store lacks.

    Args:
        objects: The names of all objects of the store.
        snapshots: The readable snapshots.
        serving: The id that `CURRENT` names, or None.
    """
    existing = set(objects)
    named: dict[str, list[str]] = {}
    for snapshot in snapshots:
        for name in names_of(snapshot):
            named.setdefault(name, []).append(snapshot.id)
    findings = [
        Finding(name, "missing", f"snapshot {ids[-1]} names it")
        for name, ids in sorted(named.items())
        if name not in existing
    ]
    if (snapshots or CURRENT in existing) and serving not in {snapshot.id for snapshot in snapshots}:
        # Either may be damaged: CURRENT, or the snapshot that it names.
        kind: FindingKind = "not_readable" if CURRENT in existing else "missing"
        findings.append(Finding(CURRENT, kind, f"names {serving}, which is no readable snapshot" if serving else ""))
        if serving and document_name(serving) not in existing:
            findings.append(Finding(document_name(serving), "missing", f"{CURRENT} names it", repairable=False))
    return findings


def check_pins_and_lease(store: Store, snapshots: Sequence[Snapshot]) -> list[Finding]:
    """Return findings for `PINS` and the lease. `snapshots` are the readable ones."""
    findings = []
    try:
        unknown = sorted({*pinned(store)} - {snapshot.id for snapshot in snapshots})
        if unknown:  # either may be damaged: PINS, or the snapshot that it names
            findings.append(Finding(PINS, "not_readable", f"names {unknown[0]}, which is no readable snapshot"))
            absent = [name for name in map(document_name, unknown) if not store.exists(name)]
            findings += [Finding(name, "missing", f"{PINS} names it", repairable=False) for name in absent]
    except (DamagedError, TypeError) as error:
        findings.append(Finding(PINS, "not_readable", error_text(error), repairable=False))
    try:
        read_lease(store)
    except DamagedError as error:
        findings.append(Finding(LEASE, "not_readable", error_text(error)))
    return findings


def is_checkable(name: str) -> bool:
    """Return whether `check_object` can check an object of this name."""
    kind, base = object_kind(name), posixpath.basename(name)
    if kind in RECORDS:
        return name.endswith((".parquet", "manifest.json"))
    if kind == "starts":  # the JSON note of a warm-up beside it has nothing to check against
        return name.endswith(".safetensors")
    return kind == "compactions" or base in ("index.json", "recipe.json", "inputs.json")


def check_object(store: Store, name: str, full: bool) -> list[Finding]:
    """Return findings for one object for which `is_checkable` is true.

    With `full`, every byte is read. Otherwise only the footer of a Parquet part and the size of an archive are
    checked. A ledger part is always read in full, because everything else depends on it.
    """
    kind = object_kind(name)
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
            _read_sealed(store, name)
        elif full:
            from prag_core.store.adapters import get_start  # imports torch, which the other checks do not need

            get_start(store, posixpath.basename(name).removesuffix(".safetensors"))
    except (DamagedError, AdapterError, *_MALFORMED) as error:
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
            else Finding(name, "checksum", f"its {len(data)} bytes do not match its name")
        ]
    columns = schema(RECORDS[object_kind(name)]).names
    table = pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False).select(columns)
    if object_kind(name) == "ledger":
        # Repair removes what a row names, if it is damaged. So a row may name shards of its recipe only.
        folder = f"{name.partition('/ledger/')[0]}/shards"
        strays = [shard for shard in table["shard"].unique().to_pylist() if posixpath.dirname(shard) != folder]
        if strays:
            return [Finding(name, "not_readable", f"names {strays[0]!r}, which is no shard of its recipe")]
    return []


def _check_manifest(store: Store, name: str) -> list[Finding]:
    document = _read_sealed(store, name)
    missing = [part for part in document["parts"] if not store.exists(part)]
    return [Finding(part, "missing", f"{name} names it") for part in missing]


def _check_index(store: Store, name: str, full: bool) -> list[Finding]:
    stored = from_dict(StoredIndex, _read_sealed(store, name))
    archive = f"{posixpath.dirname(name)}/{stored.archive_name}"
    size = store.size(archive)
    if size is None:
        return [Finding(archive, "missing", f"{name} names it")]
    if size != stored.size_bytes:
        return [Finding(archive, "size", f"{size} bytes instead of {stored.size_bytes}", size_bytes=size)]
    if full:
        with store.open(archive) as stream:
            if checksum_stream(stream) != stored.checksum:
                return [Finding(archive, "checksum", f"its bytes do not match the checksum in {name}", size_bytes=size)]
    return []


def _check_recipe(store: Store, name: str) -> None:
    recipe = Recipe.from_json(_read_sealed(store, name)["recipe"])
    if recipe.fingerprint != name.split("/")[1]:
        raise ValueError(f"says it is {recipe.fingerprint}")


def _read_sealed(store: Store, name: str) -> dict[str, Any]:
    document = store.get_sealed(name)
    if "seal" not in document:
        raise ValueError("altered: it has no seal")
    return document


def ledger_rows(store: Store, part: str) -> pa.Table:
    """Return the rows of one ledger part with the columns of `ROWS`.

    Raises:
        StoreError: if the part is missing or damaged.
    """
    table = store.get_table(LedgerRow, [part])
    return table.append_column(ROWS.field("part"), pa.repeat(pa.scalar(part), table.num_rows))


def check_shards(store: Store, rows: pa.Table, full: bool) -> list[Finding]:
    """Return findings for the shards that ledger rows name.

    Without `full`, a shard must exist and be as long as its rows say. With it, every byte is read: the shard must
    match the checksum in its name, and each adapter its own checksum, the layout's shapes, and hold only finite
    values. Shapes and values are not checked if the recipe beside the shards is damaged.

    Args:
        store: The store.
        rows: Ledger rows with the columns of `ROWS`. All rows of a shard must be among them.
        full: Whether to read every byte.

    Raises:
        StoreError: if a shard cannot be read.
    """
    groups: dict[str, list[LedgerRow]] = {}
    parts_of: dict[str, set[str]] = {}
    for row, part in zip(from_table(LedgerRow, rows), rows["part"].to_pylist(), strict=True):
        groups.setdefault(row.shard, []).append(row)
        parts_of.setdefault(row.shard, set()).add(part)
    findings = []
    opened: dict[str, AdapterStore | None] = {}
    for shard in sorted(groups):
        shard_rows, parts = groups[shard], tuple(sorted(parts_of[shard]))
        expected = max(row.offset + row.length for row in shard_rows)
        size = store.size(shard)
        if size is None:
            findings.append(Finding(shard, "missing", f"{parts[0]} names it", _keys(shard_rows), parts))
        elif size < expected:
            cut = _keys([row for row in shard_rows if row.offset + row.length > size])
            detail = f"{size} bytes, its rows need {expected}"
            findings.append(Finding(shard, "size", detail, cut, parts, size_bytes=size))
        elif full:
            recipe = shard.split("/")[1]
            if recipe not in opened:
                opened[recipe] = _open(store, recipe)
            findings += _check_bytes(store, shard, shard_rows, parts, opened[recipe])
    return findings


def _keys(rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    return tuple(sorted({row.key for row in rows}))


def _open(store: Store, recipe: str) -> AdapterStore | None:
    from prag_core.store.adapters import open_adapters

    try:
        return open_adapters(store, recipe)[0]
    except (DamagedError, *_MALFORMED):
        return None


def _check_bytes(
    store: Store, shard: str, rows: Sequence[LedgerRow], parts: tuple[str, ...], adapters: AdapterStore | None
) -> list[Finding]:
    data = store.get(shard)
    # 1. Are the bytes of each adapter those that were committed?
    altered = [row for row in rows if checksum(data[row.offset : row.offset + row.length]) != row.checksum]
    found = f"{posixpath.dirname(shard)}/{checksum(data)}.safetensors"
    if found != shard or altered:
        kind: FindingKind = "swapped" if found != shard and store.exists(found) else "checksum"
        where = f"in {len(altered)} of {len(rows)} adapters" if altered else "outside its adapters"
        detail = f"holds {posixpath.basename(found)}" if kind == "swapped" else f"bytes {where} were altered"
        return [Finding(shard, kind, detail, _keys(altered), parts, size_bytes=len(data))]
    # 2. Are these bytes adapters of this recipe?
    if adapters is None:
        return []
    findings: dict[FindingKind, list[LedgerRow]] = {}
    details: dict[FindingKind, str] = {}
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
