"""Checking a store on Ray: every object of it, in parallel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray.data
from rich.console import Console

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.execution.progress import stage_progress
from pipelines.execution.tables import group_by_columns, partitions_for, spread_names, whole_blocks
from prag_core.maintenance.inventory import Finding, check_snapshots, object_kind, serving_id
from prag_core.maintenance.verify import (
    ROWS,
    check_object,
    check_pins_and_lease,
    check_references,
    check_shards,
    is_checkable,
    ledger_rows,
)
from prag_core.store.objects import Store

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
class VerifyReport:
    """The findings of a check, and the number of objects and bytes of the whole store."""

    full: bool
    objects: int
    size_bytes: int
    seconds: float
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "seconds": round(self.seconds, 2), "damaged": len(self.findings)}


def verify_store(store: Store, profile: Profile, console: Console, *, full: bool) -> VerifyReport:
    """Check each object of a store, and each shard against all ledger rows that name it. Nothing is changed.

    Raises:
        UnreachableError: if the store does not answer, which is not damage.
    """
    begun = time.perf_counter()
    # Read a document before listing the objects that it names: a run at work stores the objects first.
    serving = serving_id(store)
    snapshots, findings = check_snapshots(store)
    objects = store.objects()
    names = [item.name for item in objects]
    findings += check_references(names, snapshots, serving) + check_pins_and_lease(store, snapshots)
    checkable = [name for name in names if is_checkable(name)]
    shards = sum(object_kind(name) == "shards" for name in names)
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
            follow(spread_names(checkable, profile).map_batches(_check_objects, **whole_blocks(), fn_kwargs=how))
        # 2. Shards, against the ledger parts that can be read.
        broken = {finding.name for finding in findings}
        parts = [name for name in names if object_kind(name) == "ledger" and name not in broken]
        if parts:
            rows = spread_names(parts, profile).map_batches(_rows, **whole_blocks(), fn_kwargs={"store": store})
            groups = group_by_columns(rows, ["shard"], partitions_for(max(len(parts), shards), profile))
            follow(groups.map_batches(_check_shards, **whole_blocks(), fn_kwargs=how))
    size = sum(item.size_bytes for item in objects)
    return VerifyReport(full, len(objects), size, time.perf_counter() - begun, tuple(findings))


def _found(findings: Sequence[Finding], checked: int) -> pa.Table:
    rows = [{**asdict(finding), "checked": 0} for finding in findings]
    # The last row holds the number of checked objects, so a block without damage has a row too.
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
