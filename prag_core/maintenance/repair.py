"""Taking damage out of a store, so that the next run makes again what is missing.

The order of writes is the promise: new shards, new ledger parts, amended snapshots, `CURRENT`; only then are old
snapshots, ledger parts and shards removed. Killed anywhere, the same repair again finds the rest and ends the same.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from prag_core.maintenance.inventory import Finding, kind_of, list_snapshots, names_of, serving_id
from prag_core.records import LedgerRow, Reject, from_table
from prag_core.store.objects import Store
from prag_core.store.runs import LEASE
from prag_core.store.shards import replace_rows
from prag_core.store.snapshot import (
    CURRENT,
    PINS,
    Snapshot,
    load_snapshot,
    move_pins,
    put_snapshot,
    renamed,
    with_tombstones,
)

# Written anew by conditional writes, never removed. A lease that is garbled goes when it is taken over.
_SINGLES = {CURRENT, PINS, LEASE}


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    `dropped` are the passages whose adapters the ledger no longer names (but for those of ledger parts that could
    not be read any more, whose passages nobody can name); `moved` the ledger parts that were replaced by others;
    `removed` the objects taken away; `snapshots` the ids of the amended snapshots by the ids of those they replace
    (empty: withdrawn); `serving` the snapshot in service now, or None.
    """

    dropped: tuple[str, ...]
    moved: tuple[str, ...]
    removed: tuple[str, ...]
    snapshots: Mapping[str, str]
    serving: str | None


def repair(store: Store, findings: Sequence[Finding], check: Callable[[], None] = lambda: None) -> Repaired:
    """Take what `findings` name out of the store, keeping every good adapter; the next run makes the rest again.

    - A ledger part that names damaged adapters is replaced by one without them; the good adapters of a damaged shard
      move into a new one. A ledger part that is itself damaged goes, and its adapters are made again.
    - A damaged corpus part takes its manifest along, a damaged archive its `index.json`; damaged augmentations,
      recipes, starts and rejects just go.
    - A snapshot that names a replaced or lost ledger part is replaced by an amended one; passages without an adapter
      go into the prompt meanwhile. A snapshot that lost its corpus, index or recipe stays if it is the one in
      service, for the next run makes these again, and says so when it is opened; otherwise it is withdrawn. So is
      one that cannot be read; if it was the one in service, the newest readable one takes its place, with the
      tombstones of all readable ones. Pins move along; where `PINS` itself cannot be read, all are lost.
    - What was found missing is not removed: if it is there by now, somebody has just written it.

    `check` is called before each removal, and raises when the store's lease is lost.

    Raises:
        ConflictError: when somebody published meanwhile; nothing is removed then, run it again.
        StoreError: when the store cannot be read or written.
    """
    damage = [finding for finding in findings if finding.is_damage]
    # 1. New shards and ledger parts, beside the old ones.
    bad: dict[str, dict[str, tuple[str, ...]]] = {}
    for finding in damage:
        if kind_of(finding.name) == "shards":
            for part in finding.parts:
                shards = bad.setdefault(part, {})
                shards[finding.name] = (*shards.get(finding.name, ()), *finding.keys)
    replaced: dict[str, str | None] = {}
    dropped: set[str] = set()
    named: set[str] = set()
    for part in sorted(bad):
        new, lost = replace_rows(store, part, bad[part])
        dropped.update(lost)
        if new:  # a shard that only had bytes too many comes out under its own name: it is whole again
            named.update(store.get_columns(new, ["shard"])["shard"].unique().to_pylist())
        if new != part:
            replaced[part] = new
    replaced.update({finding.name: None for finding in damage if kind_of(finding.name) == "ledger"})
    # 2. Snapshots, and which of them serves.
    gone = _uncommitted(damage)
    before = store.get_if_exists(CURRENT)
    chosen, forgotten = _choose(store, gone)
    amended = _amend(store, replaced, gone, chosen)
    stays = (amended.get(chosen) or load_snapshot(store, chosen)) if chosen else None
    serving = _serve(store, before, stays, forgotten)
    if store.exists(PINS):
        move_pins(store, {snapshot.id: snapshot.id for snapshot in list_snapshots(store)[0]} | _successors(amended))
    # 3. What is named no more: documents first, then what they named.
    unreadable = {finding.name for finding in damage if kind_of(finding.name) == "snapshots"} - _SINGLES
    doomed = [
        *sorted({f"snapshots/{id}.json" for id in amended} | unreadable),
        *sorted(gone),
        *sorted(replaced),
        *sorted({finding.name for finding in damage} - named - _SINGLES),
    ]
    missing = {finding.name for finding in damage if finding.kind == "missing"}
    doomed = [name for name in dict.fromkeys(doomed) if name not in missing and store.exists(name)]
    for name in doomed:
        check()
        store.remove(name)
    return Repaired(
        dropped=tuple(sorted(dropped)),
        moved=tuple(sorted(part for part, new in replaced.items() if new)),
        removed=tuple(doomed),
        snapshots={id: new.id if new else "" for id, new in amended.items()},
        serving=serving,
    )


def _successors(amended: Mapping[str, Snapshot | None]) -> dict[str, str | None]:
    return {id: new.id if new else None for id, new in amended.items()}


def _uncommitted(damage: Sequence[Finding]) -> set[str]:
    """The documents that make a damaged corpus version, index or recipe exist."""
    documents = {"corpus": "manifest.json", "indexes": "index.json", "recipes": "recipe.json"}
    return {
        f"{posixpath.dirname(finding.name)}/{documents[kind_of(finding.name)]}"
        for finding in damage
        if kind_of(finding.name) in documents
    }


def _choose(store: Store, gone: set[str]) -> tuple[str | None, set[str]]:
    """Return which snapshot shall serve, and the tombstones that it must have.

    That is the one in service; if it cannot be read, the newest readable one that lost nothing, or else the newest.
    Nobody knows then what was forgotten last, so what any of them forgot stays forgotten.
    """
    snapshots, serving = list_snapshots(store)[0], serving_id(store)
    if serving in {snapshot.id for snapshot in snapshots}:
        return serving, set()
    whole = [snapshot for snapshot in snapshots if not gone & {*names_of(snapshot)}]
    ids = [snapshot.id for snapshot in whole or snapshots]
    return ids[-1] if ids else None, {key for snapshot in snapshots for key in snapshot.tombstones}


def _amend(
    store: Store, replaced: Mapping[str, str | None], gone: set[str], serving: str | None
) -> dict[str, Snapshot | None]:
    """Write what takes the place of each snapshot that must go; None: nothing does."""
    amended: dict[str, Snapshot | None] = {}
    for snapshot in list_snapshots(store)[0]:
        if snapshot.id != serving and gone & set(names_of(snapshot)):
            amended[snapshot.id] = None
        elif any(part in replaced for part in snapshot.ledger_parts):
            parts = [replaced.get(part, part) for part in snapshot.ledger_parts]
            left = tuple(sorted({part for part in parts if part}))
            keys = store.get_table(LedgerRow, left, ["key"])["key"].unique()
            new = renamed(replace(snapshot, ledger_parts=left, adapters=min(snapshot.adapters, len(keys))))
            put_snapshot(store, new)
            amended[snapshot.id] = new
    return amended


def _serve(store: Store, before: bytes | None, snapshot: Snapshot | None, forgotten: set[str]) -> str | None:
    """Put a snapshot with these tombstones into service, unless another one came into it since `before` was read."""
    if snapshot is None:
        if before is not None:  # no snapshot is left: the next run publishes as if it were the first
            store.remove(CURRENT)
        return None
    if not forgotten <= {*snapshot.tombstones}:
        snapshot = with_tombstones(snapshot, forgotten)
        put_snapshot(store, snapshot)
    wanted = json.dumps({"snapshot": snapshot.id}).encode()
    if wanted != before:
        store.swap(CURRENT, before, wanted)
    return snapshot.id


def forget_rejects(store: Store, stage: str | None, reason: str | None) -> int:
    """Forget rejects, all or those of a stage and a reason, so that the next run tries these inputs again.

    Returns:
        How many different inputs were forgotten.

    Raises:
        StoreError: when a part of the rejects cannot be read.
    """
    forgotten: set[tuple[str, str, str]] = set()
    for part in store.list(f"rejects/{stage}" if stage else "rejects", ".parquet"):
        table = store.get_table(Reject, [part])
        matches = pc.equal(table["reason"], reason) if reason else pc.is_valid(table["reason"])
        chosen = table.filter(matches)
        if not chosen.num_rows:
            continue
        forgotten |= {(row.stage, row.key or row.source, row.recipe) for row in from_table(Reject, chosen)}
        rest = table.filter(pc.invert(matches))
        if rest.num_rows:
            store.put_table(posixpath.dirname(part), rest)
        store.remove(part)
    return len(forgotten)
