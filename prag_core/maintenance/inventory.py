"""What a store holds: its objects by kind, its snapshots, its size, and the record of a finding.

Nothing here changes a store. `verify` finds damage and `repair` removes it; `garbage` finds and removes what nobody
needs.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.errors import REPAIR, DamagedError, PragError, StoreError
from prag_core.records import Augmentation, LedgerRow, Passage, Reject
from prag_core.store.backend import StoredObject
from prag_core.store.objects import Store
from prag_core.store.pins import PINS
from prag_core.store.snapshot import CURRENT, Snapshot, current_id, document_name, load_snapshot, snapshot_ids

FindingKind = Literal[
    "missing", "size", "checksum", "not_readable", "not_finite", "shape", "swapped", "orphan", "unreferenced"
]

RECORDS: dict[str, type] = {
    "corpus": Passage,
    "augmentations": Augmentation,
    "ledger": LedgerRow,
    "rejects": Reject,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One object that is damaged, or that nobody needs.

    `keys` are the passages whose adapters are damaged, `parts` the ledger parts whose rows name the object. If
    `repairable`, the next run makes again what `repair` removes; otherwise it is lost for good.
    """

    name: str
    kind: FindingKind
    detail: str = ""
    keys: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    repairable: bool = True
    size_bytes: int = 0

    @property
    def is_damage(self) -> bool:
        """Whether the object is damaged, not merely unneeded."""
        return self.kind not in ("orphan", "unreferenced")


def object_kind(name: str) -> str:
    """Return the kind of an object, by its name.

    The kinds are corpus, augmentations, shards, ledger, compactions, recipes, starts, indexes, snapshots (CURRENT and
    PINS too), rejects, runs, evaluations, scratch (left by a killed writer) and other.
    """
    top, base = name.split("/")[0], posixpath.basename(name)
    if base.endswith(".tmp") or base.startswith(".probe-"):
        return "scratch"
    if top == "adapters":
        return next((kind for kind in ("shards", "ledger", "compactions") if f"/{kind}/" in name), "recipes")
    if name in (CURRENT, PINS):
        return "snapshots"
    return top if top in (*RECORDS, "starts", "indexes", "snapshots", "runs", "evaluations") else "other"


def check_snapshots(store: Store) -> tuple[list[Snapshot], list[Finding]]:
    """Return the readable snapshots, oldest first, and a finding for each damaged one."""
    snapshots, findings = [], []
    for id in snapshot_ids(store):
        try:
            snapshots.append(load_snapshot(store, id))
        except DamagedError as error:
            findings.append(Finding(document_name(id), "not_readable", error_text(error), repairable=False))
    return sorted(snapshots, key=lambda snapshot: (snapshot.created, snapshot.id)), findings


def serving_id(store: Store) -> str | None:
    """Return the id of the snapshot in service, or None if `CURRENT` is missing or damaged."""
    try:
        return current_id(store)
    except DamagedError:
        return None


def names_of(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the names of the objects that a snapshot names directly."""
    return (
        f"corpus/{snapshot.corpus_version}/manifest.json",
        f"indexes/{snapshot.index}/index.json",
        f"adapters/{snapshot.recipe}/recipe.json",
        *snapshot.ledger_parts,
    )


def error_text(error: Exception) -> str:
    """Return the first line of an error's message, of at most 300 characters."""
    text = error.message if isinstance(error, PragError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:300] if text else type(error).__name__


@dataclass(frozen=True)
class StoreUsage:
    """The bytes and the number of objects of a store by kind (see `object_kind`), and of the adapters in its ledger."""

    size_bytes: Mapping[str, int]
    objects: Mapping[str, int]
    adapters: int
    unreferenced_bytes: int

    @property
    def bytes_per_adapter(self) -> float:
        """The bytes of shards and ledger for each adapter that the ledger names."""
        return (self.size_bytes.get("shards", 0) + self.size_bytes.get("ledger", 0)) / max(self.adapters, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the usage as plain values."""
        return {**asdict(self), "bytes_per_adapter": round(self.bytes_per_adapter, 1)}


def count_usage(store: Store, objects: Sequence[StoredObject], unreferenced_bytes: int) -> StoreUsage:
    """Count a store's bytes and objects. Of the ledger, only the Parquet footers are read.

    Raises:
        StoreError: if a ledger part cannot be read.
    """
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    adapters = 0
    for item in objects:
        kind = object_kind(item.name)
        sizes[kind] += item.size_bytes
        counts[kind] += 1
        if kind == "ledger":
            adapters += _rows(store, item.name)
    return StoreUsage(dict(sizes), dict(counts), adapters, unreferenced_bytes)


def _rows(store: Store, part: str) -> int:
    try:
        with store.open(part) as stream:
            return int(pq.read_metadata(stream).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{store.url}/{part}: not a readable ledger part: {error}", REPAIR) from None
