"""What a store holds, and whether it is as it was written.

Checks are functions over a `Store` that give back findings and change nothing; `prag_core.repair` and
`prag_core.garbage` act on them. Shards are the business of `prag_core.shards`.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.errors import PragError, StoreError, UnreachableError
from prag_core.identity import checksum, is_intact
from prag_core.index_store import StoredIndex, checksum_stream
from prag_core.lease import LEASE, read_lease
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, LedgerRow, Passage, Reject, from_dict, schema
from prag_core.snapshot import CURRENT, PINS, Snapshot, load_snapshot, pinned
from prag_core.store import Store

Kind = Literal[
    "missing", "size", "checksum", "not_readable", "not_finite", "shape", "swapped", "orphan", "unreferenced"
]

_RECORDS: dict[str, type] = {
    "corpus": Passage,
    "augmentations": Augmentation,
    "ledger": LedgerRow,
    "rejects": Reject,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One object that is not as it should be, or that nothing names.

    `keys` are the passages whose adapters it concerns, `parts` the ledger parts whose rows name it. `repairable`:
    the next run makes again what `repair` takes away; otherwise it is gone.
    """

    name: str
    kind: Kind
    detail: str = ""
    keys: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    repairable: bool = True
    size_bytes: int = 0

    @property
    def is_damage(self) -> bool:
        """Whether this is damage, not just something that nobody needs."""
        return self.kind not in ("orphan", "unreferenced")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of the store; `modified` is in seconds since the epoch."""

    name: str
    size_bytes: int
    modified: float


def kind_of(name: str) -> str:
    """Return what an object is, by its name.

    One of corpus, augmentations, shards, ledger, compactions, recipes, starts, indexes, snapshots (CURRENT and PINS
    too), rejects, runs, scratch (what a killed writer left) and other.
    """
    top, base = name.split("/")[0], posixpath.basename(name)
    if base.endswith(".tmp") or base.startswith(".probe-"):
        return "scratch"
    if top == "adapters":
        return next((kind for kind in ("shards", "ledger", "compactions") if f"/{kind}/" in name), "recipes")
    if name in (CURRENT, PINS):
        return "snapshots"
    return top if top in (*_RECORDS, "starts", "indexes", "snapshots", "runs") else "other"


def list_objects(store: Store) -> list[StoredObject]:
    """Return every object of the store, with sizes and times, by listing alone; locks are none.

    Raises:
        StoreError: when the store cannot be listed.
    """
    found = []
    for name, info in store.infos().items():
        if not name.endswith(".lock"):
            modified = info.get("LastModified", info.get("mtime", info.get("created", 0.0)))
            seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
            found.append(StoredObject(name, int(info["size"]), seconds))
    return sorted(found, key=lambda item: item.name)


def remove(store: Store, name: str) -> None:
    """Remove an object; one that is not there is removed already.

    Raises:
        StoreError: when it cannot be removed.
    """
    try:
        store.remove(name)
    except StoreError:
        if store.exists(name):
            raise


# ---- snapshots


def list_snapshots(store: Store) -> tuple[list[Snapshot], list[Finding]]:
    """Return the readable snapshots, oldest first, and a finding for each one that is not as it was published.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    snapshots, findings = [], []
    for name in store.list("snapshots", ".json"):
        try:
            snapshots.append(load_snapshot(store, name.removeprefix("snapshots/").removesuffix(".json")))
        except UnreachableError:
            raise
        except StoreError as error:
            findings.append(Finding(name, "not_readable", _words(error), repairable=False))
    return sorted(snapshots, key=lambda snapshot: (snapshot.created, snapshot.id)), findings


def serving_id(store: Store) -> str | None:
    """Return the id that `CURRENT` names, or None when there is no `CURRENT` or it names none.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    try:
        return str(json.loads(store.get(CURRENT))["snapshot"])
    except UnreachableError:
        raise
    except (StoreError, ValueError, TypeError, KeyError):
        return None


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
        findings.append(Finding(PINS, "not_readable", _words(error), repairable=False))
    try:
        read_lease(store)
    except UnreachableError:
        raise
    except StoreError as error:
        findings.append(Finding(LEASE, "not_readable", _words(error)))
    return findings


def names_of(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the objects that a snapshot names itself; what these name in turn is theirs."""
    return (
        f"corpus/{snapshot.corpus_version}/manifest.json",
        f"indexes/{snapshot.index}/index.json",
        f"adapters/{snapshot.recipe}/recipe.json",
        *snapshot.ledger_parts,
    )


# ---- everything but shards


def is_checkable(name: str) -> bool:
    """Whether `check_object` knows what an object should hold."""
    kind, base = kind_of(name), posixpath.basename(name)
    if kind in _RECORDS:
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
            from prag_core.adapter_store import get_start  # torch, which workers that check parts do without

            get_start(store, posixpath.basename(name).removesuffix(".safetensors"))
    except UnreachableError:
        raise
    except (PragError, pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [Finding(name, "not_readable", _words(error))]
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
    columns = schema(_RECORDS[kind_of(name)]).names
    pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False).select(columns)
    return []


def _check_manifest(store: Store, name: str) -> list[Finding]:
    document = _intact(store, name)
    missing = [part for part in document["parts"] if not store.exists(part)]
    return [Finding(part, "missing", f"{name} names it") for part in missing]


def _check_index(store: Store, name: str, full: bool) -> list[Finding]:
    stored = from_dict(StoredIndex, _intact(store, name))
    archive = f"{posixpath.dirname(name)}/lucene.tar.zst"
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


def _words(error: Exception) -> str:
    text = error.message if isinstance(error, PragError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:300] if text else type(error).__name__


# ---- sizes


@dataclass(frozen=True)
class Usage:
    """Bytes and objects of a store by kind (see `kind_of`), and how many adapters its ledger names."""

    size_bytes: Mapping[str, int]
    objects: Mapping[str, int]
    adapters: int
    unreferenced_bytes: int

    @property
    def bytes_per_adapter(self) -> float:
        """Shards and ledger, by the adapters that the ledger names."""
        return (self.size_bytes.get("shards", 0) + self.size_bytes.get("ledger", 0)) / max(self.adapters, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the usage as plain values."""
        return {**asdict(self), "bytes_per_adapter": round(self.bytes_per_adapter, 1)}


def usage(store: Store, objects: Sequence[StoredObject], unreferenced_bytes: int) -> Usage:
    """Count a store's bytes; of the ledger only footers are read.

    Raises:
        StoreError: when a ledger part cannot be read.
    """
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    adapters = 0
    for item in objects:
        kind = kind_of(item.name)
        sizes[kind] += item.size_bytes
        counts[kind] += 1
        if kind == "ledger":
            adapters += _rows(store, item.name)
    return Usage(dict(sizes), dict(counts), adapters, unreferenced_bytes)


def _rows(store: Store, part: str) -> int:
    try:
        with store.open(part) as stream:
            return int(pq.read_metadata(stream).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{store.url}/{part}: not a readable ledger part: {error}", "run `prag repair`") from None
