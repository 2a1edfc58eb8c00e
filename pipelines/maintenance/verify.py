"""Checking a store on Ray: every object of it, in parallel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from rich.console import Console

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.execution.progress import stage_progress
from pipelines.execution.tables import blocks_for_parts, group_by_columns, map_blocks, map_objects
from prag_core.errors import StoreError
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
from prag_core.records import from_dict, schema
from prag_core.store.objects import Store
from prag_core.store.runs import LEASE

_FINDING = pa.schema([*schema(Finding), pa.field("checked", pa.int64())])


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
        StoreError: when it cannot be read, or is empty: then "no damage" would say that all is well.
    """
    begun = time.perf_counter()
    # Read a document before listing the objects that it names: a run at work stores the objects first.
    serving = serving_id(store)
    snapshots, findings = check_snapshots(store)
    objects = store.objects()
    names = [item.name for item in objects]
    if not {*names} - {LEASE}:
        raise StoreError(
            f"store = {store.url!r}: is empty",
            "check that -c names your configuration, `store` in it, and that its disk is mounted; `prag run` fills it",
        )
    findings += check_references(names, snapshots, serving) + check_pins_and_lease(store, snapshots)
    checkable = [name for name in names if is_checkable(name)]
    shards = sum(object_kind(name) == "shards" for name in names)
    with ray_session(profile), stage_progress(console, "verify", len(checkable) + shards, "objects") as advance:
        checked = 0

        def follow(found: ray.data.Dataset) -> None:
            nonlocal checked
            for row in found.iter_rows():
                checked += row.pop("checked")
                if row["kind"]:
                    findings.append(from_dict(Finding, row))
            advance(checked, 0)

        # 1. Everything but shards.
        if checkable:
            blocks = blocks_for_parts(len(checkable), profile)
            follow(map_objects(checkable, blocks, lambda name: _found(check_object(store, name, full), 1)))
        # 2. Shards, against the ledger parts that can be read.
        broken = {finding.name for finding in findings}
        parts = [name for name in names if object_kind(name) == "ledger" and name not in broken]
        if parts:
            rows = map_objects(parts, blocks_for_parts(len(parts), profile), partial(ledger_rows, store))
            groups = group_by_columns(rows, ["shard"], blocks_for_parts(max(len(parts), shards), profile))
            follow(map_blocks(groups, _check_shards, store=store, full=full))
    size = sum(item.size_bytes for item in objects)
    return VerifyReport(full, len(objects), size, time.perf_counter() - begun, tuple(findings))


def _found(findings: Sequence[Finding], checked: int) -> pa.Table:
    rows = [{**asdict(finding), "checked": 0} for finding in findings]
    # The last row holds the number of checked objects, so a block without damage has a row too.
    return pa.Table.from_pylist([*rows, {"kind": "", "checked": checked}], schema=_FINDING)


def _check_shards(table: pa.Table, store: Store, full: bool) -> pa.Table:
    shards = len(table["shard"].unique())
    return _found(check_shards(store, table.select(ROWS.names), full), shards)
