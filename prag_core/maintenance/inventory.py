"""What a store holds, and whether it is as it was written.

Checks are functions over a `Store` that give back findings and change nothing; `prag_core.maintenance.repair` and
`prag_core.maintenance.garbage` act on them. Shards are the business of `prag_core.store.shards`.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prag_core.errors import PragError, StoreError, UnreachableError
from prag_core.records import Augmentation, LedgerRow, Passage, Reject
from prag_core.store.backend import StoredObject
from prag_core.store.objects import Store
from prag_core.store.snapshot import CURRENT, PINS, Snapshot, load_snapshot

Kind = Literal[
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
    return top if top in (*RECORDS, "starts", "indexes", "snapshots", "runs") else "other"


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
            findings.append(Finding(name, "not_readable", error_text(error), repairable=False))
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


def names_of(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the objects that a snapshot names itself; what these name in turn is theirs."""
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


# ---- sizes


@dataclass(frozen=True)
class StoreUsage:
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


def usage(store: Store, objects: Sequence[StoredObject], unreferenced_bytes: int) -> StoreUsage:
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
    return StoreUsage(dict(sizes), dict(counts), adapters, unreferenced_bytes)


def _rows(store: Store, part: str) -> int:
    try:
        with store.open(part) as stream:
            return int(pq.read_metadata(stream).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{store.url}/{part}: not a readable ledger part: {error}", "run `prag repair`") from None
