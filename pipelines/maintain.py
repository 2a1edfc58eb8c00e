"""Checking and compacting a store on Ray: what has to read all of it, in parallel."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from rich.console import Console

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.progress import stage_progress
from pipelines.shuffle import together
from prag_core.compaction import (
    MARKED,
    ROWS_PER_PART,
    Compaction,
    corpus_keys,
    mark_live,
    put_rows,
    record_compaction,
    settle,
)
from prag_core.forgetting import corpus_parts
from prag_core.maintenance import (
    Finding,
    check_object,
    check_references,
    check_singles,
    is_checkable,
    kind_of,
    list_objects,
    list_snapshots,
    serving_id,
)
from prag_core.records import LedgerRow, schema
from prag_core.shards import ROWS, check_shards, ledger_rows
from prag_core.snapshot import Snapshot, publish, with_ledger
from prag_core.store import Store

# Objects a task: enough that starting it does not count, few enough that they spread.
_OBJECTS_PER_TASK = 64
_FINDING = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("name", "kind", "detail")),
        *(pa.field(name, pa.list_(pa.string())) for name in ("keys", "parts")),
        pa.field("repairable", pa.bool_()),
        pa.field("size_bytes", pa.int64()),
        pa.field("checked", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Verified:
    """What a check of a store found, and how much it looked at; `size_bytes` is the whole store's."""

    full: bool
    objects: int
    size_bytes: int
    seconds: float
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain values."""
        return {**asdict(self), "seconds": round(self.seconds, 2), "damaged": len(self.findings)}


def verify_store(store: Store, profile: Profile, console: Console, *, full: bool) -> Verified:
    """Check a store on Ray: each object once, each shard with all ledger rows that name it. Changes nothing.

    Raises:
        UnreachableError: when the store does not answer: that is no damage.
    """
    begun = time.perf_counter()
    # What names something is looked at before it: a run at work stores that first.
    serving = serving_id(store)
    snapshots, findings = list_snapshots(store)
    objects = list_objects(store)
    names = [item.name for item in objects]
    findings += check_references(names, snapshots, serving) + check_singles(store, snapshots)
    checkable = [name for name in names if is_checkable(name)]
    shards = sum(kind_of(name) == "shards" for name in names)
    how = {"store": store, "full": full}
    with ray_session(profile), stage_progress(console, "verify", len(checkable) + shards, "objects") as advance:
        checked = 0

        def follow(found: ray.data.Dataset) -> None:
            nonlocal checked
            for row in found.iter_rows():
                checked += row.pop("checked")
                if row["kind"]:
                    findings.append(Finding(**{**row, "keys": tuple(row["keys"]), "parts": tuple(row["parts"])}))
            advance(checked, 0)

        # 1. Everything but shards.
        if checkable:
            follow(_tasks(checkable, profile).map_batches(_check_objects, **_blocks(), fn_kwargs=how))
        # 2. Shards, against the ledger parts that can be read.
        broken = {finding.name for finding in findings}
        parts = [name for name in names if kind_of(name) == "ledger" and name not in broken]
        if parts:
            rows = _tasks(parts, profile).map_batches(_rows, **_blocks(), fn_kwargs={"store": store})
            groups = together(rows, ["shard"], _partitions(max(len(parts), shards), profile))
            follow(groups.map_batches(_check_shards, **_blocks(), fn_kwargs=how))
    size = sum(item.size_bytes for item in objects)
    return Verified(full, len(objects), size, time.perf_counter() - begun, tuple(findings))


@dataclass(frozen=True)
class Compacted:
    """What a compaction did, or would do.

    `rows` are those of the snapshot in service, `superseded` and `forgotten` those of them that no longer count (a
    row is superseded by a later one, or by corpora that have its passage no more); `parts` the ledger parts before,
    `new_parts` after (0: it was not worth it, or only looked at); `snapshot` the one in service after it.
    """

    rows: int
    superseded: int
    forgotten: int
    parts: int
    new_parts: int
    snapshot: str


def compact(
    store: Store,
    snapshot: Snapshot,
    profile: Profile,
    corpora: Collection[str],
    *,
    since: float,
    dry_run: bool = False,
) -> Compacted:
    """Put few ledger parts and full shards in the place of the snapshot's, and publish a snapshot that names them.

    Nothing is done when the parts are few, all rows count, and no shard holds a forgotten passage.

    Args:
        store: The store.
        snapshot: The one in service.
        profile: On what it runs.
        corpora: The versions of the corpora, besides the snapshot's, whose passages keep their adapters.
        since: Adapters that were made later, in seconds since the epoch, are kept whosesoever they are.
        dry_run: Only look.

    Raises:
        ConflictError: when somebody published meanwhile; nothing is lost, and the old parts stay in service.
        StoreError: when the store cannot be read or written.
    """
    forgotten = sorted(snapshot.tombstones)
    if not snapshot.ledger_parts:
        return Compacted(0, 0, 0, 0, 0, snapshot.id)
    with ray_session(profile):
        # 1. Which rows count: all rows of a key meet.
        versions = sorted({snapshot.corpus_version, *corpora})
        parts = [*snapshot.ledger_parts, *(part for version in versions for part in corpus_parts(store, version))]
        rows = _tasks(parts, profile).map_batches(_plain_rows, **_blocks(), fn_kwargs={"store": store})
        marked = (
            together(rows, ["key"], _partitions(len(parts), profile))
            .map_batches(_mark, **_blocks(), fn_kwargs={"forgotten": forgotten, "since": since})
            .materialize()
        )
        counts = marked.map_batches(_count, **_blocks(), fn_kwargs={"forgotten": forgotten}).take_all()
        total, live, erased = (sum(row[name] for row in counts) for name in ("rows", "live", "erased"))
        wanted = max(1, -(-live // ROWS_PER_PART))
        before = len(snapshot.ledger_parts)
        nothing = Compacted(total, total - live - erased, erased, before, 0, snapshot.id)
        if dry_run or (before < 2 * wanted and live == total and not forgotten):
            return nothing
        # 2. Where they lie: all rows of a shard meet, and each group of shards becomes one part.
        arguments = {"store": store, "recipe": snapshot.recipe, "forgotten": forgotten}
        written = together(marked, ["shard"], wanted).map_batches(_settle, **_blocks(), fn_kwargs=arguments).take_all()
    made = tuple(sorted({row["part"] for row in written if row["part"]}))
    if {*made} == {*snapshot.ledger_parts}:
        return nothing
    # 3. The commit, and the snapshot that shows it.
    replaced = tuple(part for part in snapshot.ledger_parts if part not in made)
    record_compaction(store, snapshot.recipe, Compaction(made, replaced))
    new = with_ledger(snapshot, made, min(live, max(snapshot.adapters - erased, 0)))
    publish(store, new, replaces=snapshot.id)
    return Compacted(total, total - live - erased, erased, before, len(made), new.id)


def _blocks() -> dict[str, Any]:
    return {"batch_size": None, "batch_format": "pyarrow"}


def _tasks(names: Sequence[str], profile: Profile) -> ray.data.Dataset:
    return ray.data.from_items([{"name": name} for name in names], override_num_blocks=_partitions(len(names), profile))


def _partitions(objects: int, profile: Profile) -> int:
    """Return into how many tasks so many objects are cut: what one task does at once needs no second."""
    return 1 if objects <= _OBJECTS_PER_TASK else max(profile.partitions, -(-objects // _OBJECTS_PER_TASK))


def _found(findings: Sequence[Finding], checked: int) -> pa.Table:
    rows = [{**asdict(finding), "checked": 0} for finding in findings]
    # The last row says how much was looked at: also a block without damage has a row.
    return pa.Table.from_pylist([*rows, {"kind": "", "checked": checked}], schema=_FINDING)


def _check_objects(table: pa.Table, store: Store, full: bool) -> Iterator[pa.Table]:
    for name in table["name"].to_pylist():
        yield _found(check_object(store, name, full), 1)


def _rows(table: pa.Table, store: Store) -> Iterator[pa.Table]:
    for name in table["name"].to_pylist():
        yield ledger_rows(store, name)


def _check_shards(table: pa.Table, store: Store, full: bool) -> pa.Table:
    if not table.num_rows:
        return _found([], 0)
    shards = len(table["shard"].unique())
    return _found(check_shards(store, table.select(ROWS.names), full), shards)


def _plain_rows(table: pa.Table, store: Store) -> Iterator[pa.Table]:
    for name in table["name"].to_pylist():
        yield store.get_table(LedgerRow, [name]) if kind_of(name) == "ledger" else corpus_keys(store, name)


def _mark(table: pa.Table, forgotten: list[str], since: float) -> pa.Table:
    rows = table.select(schema(LedgerRow).names) if table.num_columns else schema(LedgerRow).empty_table()
    return mark_live(rows, forgotten, since)


def _count(table: pa.Table, forgotten: list[str]) -> pa.Table:
    if not table.num_columns:
        return pa.table({"rows": [0], "live": [0], "erased": [0]})
    live = pc.sum(table["live"].cast(pa.int64())).as_py() or 0
    erased = pc.sum(pc.is_in(table["key"], value_set=pa.array(forgotten, pa.string())).cast(pa.int64())).as_py() or 0
    return pa.table({"rows": [table.num_rows], "live": [live], "erased": [erased]})


def _settle(table: pa.Table, store: Store, recipe: str, forgotten: list[str]) -> pa.Table:
    rows = settle(store, table.select(MARKED.names), forgotten) if table.num_rows else []
    return pa.table({"part": pa.array([put_rows(store, recipe, rows) if rows else ""], pa.string())})
