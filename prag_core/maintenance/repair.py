"""Repair: remove the damaged objects of a store, so that the next run makes again what is missing.

New shards are written first, then new ledger parts, amended snapshots, and `CURRENT`. Only then are old snapshots,
ledger parts and shards removed. After a kill at any moment, the same repair finds the rest and ends the same.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prag_core.maintenance.inventory import Finding, check_snapshots, names_of, object_kind, serving_id
from prag_core.records import LedgerRow
from prag_core.store.objects import Store
from prag_core.store.pins import PINS, move_pins
from prag_core.store.runs import LEASE
from prag_core.store.shards import replace_rows
from prag_core.store.snapshot import (
    CURRENT,
    Snapshot,
    document_name,
    encode_current,
    load_snapshot,
    put_snapshot,
    with_id,
    with_tombstones,
)

# Replaced by conditional writes, never removed. A damaged lease is replaced when it is taken over.
_SINGLES = {CURRENT, PINS, LEASE}


@dataclass(frozen=True)
class RepairResult:
    """What a repair changed.

    `dropped` are the keys of the passages whose adapters the ledger no longer names; those of unreadable ledger parts
    are unknown, and missing here. `moved` are the ledger parts that were replaced by others, and `removed` all objects
    that were removed. `snapshots` maps the ids of removed snapshots to those of the amended ones ("": there is none).
    `serving` is the id of the snapshot in service now, or None.
    """

    dropped: tuple[str, ...]
    moved: tuple[str, ...]
    removed: tuple[str, ...]
    snapshots: Mapping[str, str]
    serving: str | None


def repair(store: Store, findings: Sequence[Finding], check: Callable[[], None] = lambda: None) -> RepairResult:
    """Remove the damaged objects from a store and keep every good adapter. The next run makes the rest again.

    - A ledger part that names damaged adapters is replaced by one without them. The good adapters of a damaged shard
      move into a new shard. A damaged ledger part is removed, and its adapters are trained again.
    - With a damaged corpus part its manifest is removed, and with a damaged archive its `index.json`. Damaged
      augmentations, recipes, starts and rejects are removed alone.
    - A snapshot that names a replaced or removed ledger part is replaced by an amended one. Passages without an
      adapter go into the prompt meanwhile.
    - A snapshot whose corpus, index or recipe is damaged is removed, unless it is in service: the next run makes these
      again, and opening it fails until then.
    - An unreadable snapshot is removed. If it was in service, the newest readable one takes its place, with the
      tombstones of all readable ones. Pins move to the amended snapshots; if `PINS` is damaged, all pins are lost.
    - An object that was found missing is not removed: if it exists by now, somebody has just written it.

    `check` is called before each removal; it raises if the lease is lost.

    Raises:
        ConflictError: if somebody published meanwhile. Nothing is removed then; run it again.
        StoreError: if the store cannot be read or written.
    """
    damage = [finding for finding in findings if finding.is_damage]
    # 1. New shards and ledger parts, beside the old ones.
    bad: dict[str, dict[str, tuple[str, ...]]] = {}
    for finding in damage:
        if object_kind(finding.name) == "shards":
            for part in finding.parts:
                shards = bad.setdefault(part, {})
                shards[finding.name] = (*shards.get(finding.name, ()), *finding.keys)
    replaced: dict[str, str | None] = {}
    dropped: set[str] = set()
    named: set[str] = set()
    for part in sorted(bad):
        new, lost = replace_rows(store, part, bad[part])
        dropped.update(lost)
        if new:  # a shard that only had extra bytes is written under its own name, and is whole again
            named.update(store.get_columns(new, ["shard"])["shard"].unique().to_pylist())
        if new != part:
            replaced[part] = new
    replaced.update({finding.name: None for finding in damage if object_kind(finding.name) == "ledger"})
    # 2. Snapshots, and which of them is in service.
    documents = _documents_of(damage)
    before = store.get_if_exists(CURRENT)
    chosen, forgotten = _choose(store, documents)
    amended = _amend(store, replaced, documents, chosen)
    to_serve = (amended.get(chosen) or load_snapshot(store, chosen)) if chosen else None
    serving = _serve(store, before, to_serve, forgotten)
    if store.exists(PINS):
        move_pins(store, {snapshot.id: snapshot.id for snapshot in check_snapshots(store)[0]} | _successors(amended))
    # 3. Objects that nothing names any more: documents first, then the objects that they named.
    unreadable = {finding.name for finding in damage if object_kind(finding.name) == "snapshots"} - _SINGLES
    to_remove = [
        *sorted({document_name(id) for id in amended} | unreadable),
        *sorted(documents),
        *sorted(replaced),
        *sorted({finding.name for finding in damage} - named - _SINGLES),
    ]
    missing = {finding.name for finding in damage if finding.kind == "missing"}
    to_remove = [name for name in dict.fromkeys(to_remove) if name not in missing and store.exists(name)]
    for name in to_remove:
        check()
        store.remove(name)
    return RepairResult(
        dropped=tuple(sorted(dropped)),
        moved=tuple(sorted(part for part, new in replaced.items() if new)),
        removed=tuple(to_remove),
        snapshots={id: new.id if new else "" for id, new in amended.items()},
        serving=serving,
    )


def _successors(amended: Mapping[str, Snapshot | None]) -> dict[str, str | None]:
    return {id: new.id if new else None for id, new in amended.items()}


def _documents_of(damage: Sequence[Finding]) -> set[str]:
    """Return the documents that make the damaged corpus versions, indexes and recipes exist."""
    by_kind = {"corpus": "manifest.json", "indexes": "index.json", "recipes": "recipe.json"}
    return {
        f"{posixpath.dirname(finding.name)}/{by_kind[object_kind(finding.name)]}"
        for finding in damage
        if object_kind(finding.name) in by_kind
    }


def _choose(store: Store, documents: set[str]) -> tuple[str | None, set[str]]:
    """Return the id of the snapshot to put into service, and the tombstones that it must have.

    It is the snapshot in service. If that is unreadable, it is the newest readable one whose objects are undamaged, or
    else the newest readable one. The latest tombstones are unknown then, so it gets those of all readable snapshots.
    """
    snapshots, serving = check_snapshots(store)[0], serving_id(store)
    if serving in {snapshot.id for snapshot in snapshots}:
        return serving, set()
    whole = [snapshot for snapshot in snapshots if not documents & {*names_of(snapshot)}]
    ids = [snapshot.id for snapshot in whole or snapshots]
    return ids[-1] if ids else None, {key for snapshot in snapshots for key in snapshot.tombstones}


def _amend(
    store: Store, replaced: Mapping[str, str | None], documents: set[str], serving: str | None
) -> dict[str, Snapshot | None]:
    """Store an amended snapshot for each one whose ledger parts were replaced; return them by the old ids.

    None stands for a snapshot that is removed without an amended one, because its other objects are damaged.
    """
    amended: dict[str, Snapshot | None] = {}
    for snapshot in check_snapshots(store)[0]:
        if snapshot.id != serving and documents & set(names_of(snapshot)):
            amended[snapshot.id] = None
        elif any(part in replaced for part in snapshot.ledger_parts):
            parts = [replaced.get(part, part) for part in snapshot.ledger_parts]
            remaining = tuple(sorted({part for part in parts if part}))
            keys = store.get_table(LedgerRow, remaining, ["key"])["key"].unique()
            new = with_id(replace(snapshot, ledger_parts=remaining, adapters=min(snapshot.adapters, len(keys))))
            put_snapshot(store, new)
            amended[snapshot.id] = new
    return amended


def _serve(store: Store, before: bytes | None, snapshot: Snapshot | None, forgotten: set[str]) -> str | None:
    """Put a snapshot with these tombstones into service, if `CURRENT` is still `before`; return its id."""
    if snapshot is None:
        store.remove(CURRENT)  # no snapshot is left, so the next run publishes as the first one did
        return None
    if not forgotten <= {*snapshot.tombstones}:
        snapshot = with_tombstones(snapshot, forgotten)
        put_snapshot(store, snapshot)
    after = encode_current(snapshot.id)
    if after != before:
        store.swap(CURRENT, before, after)
    return snapshot.id
