"""What an operator does to a store. What changes it holds the run's lease; what is one conditional write needs none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from pipelines.maintenance.compact import CompactionReport, compact
from pipelines.maintenance.verify import VerifyReport, verify_store
from pipelines.settings import profile_of
from prag_core.config import Config
from prag_core.errors import InputError
from prag_core.maintenance.erasure import erase_rows, snapshots_to_keep
from prag_core.maintenance.garbage import Garbage, collect, find_garbage, needed_corpora
from prag_core.maintenance.inventory import StoreUsage, usage
from prag_core.maintenance.repair import Repaired, forget_rejects, repair
from prag_core.records import Reject, from_table
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import RunLease, hold_lease, new_run_id
from prag_core.store.snapshot import (
    current_id,
    kept_snapshots,
    load_snapshot,
    publish,
    with_tombstones,
    without_tombstones,
)
from prag_core.store.tables import KnownPassage, find_passages, is_key


def verify(config: Config, console: Console, *, full: bool) -> VerifyReport:
    """Check the store of a configuration; see `verify_store`."""
    return verify_store(open_store(config), profile_of(config), console, full=full)


@dataclass(frozen=True)
class RepairReport:
    """What `prag repair` found, took out, and made again (`run` is that run's report, None when none was needed)."""

    verified: VerifyReport
    repaired: Repaired | None
    run: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        repaired = asdict(self.repaired) if self.repaired else None
        return {"verified": self.verified.to_json(), "repaired": repaired, "run": self.run}


def repair_store(config: Config, console: Console, *, full: bool, run: bool, take_over: bool) -> RepairReport:
    """Check the store, take out what is damaged, and make it again by a run of this configuration.

    Raises:
        LeaseError: when a run works on the store.
        PragError: see `run_job`; what was taken out by then stays out, and the same command goes on.
    """
    from pipelines.jobs.run import run_job

    store = open_store(config)
    # Under the lease from the first look on: nobody compacts or collects what is found meanwhile.
    with hold_lease(store, new_run_id("repair"), take_over=take_over) as lease:
        verified = verify(config, console, full=full)
        if not verified.findings:
            return RepairReport(verified, None, None)
        lease.check()
        repaired = repair(store, verified.findings, lease.check)
    report = run_job(config, console).to_json() if run else None
    return RepairReport(verified, repaired, report)


@dataclass(frozen=True)
class GarbageReport:
    """What `prag gc` compacted, erased and removed, or would.

    `held` are forgotten passages' bytes that stay, by the kept snapshot that names them.
    """

    dry_run: bool
    compacted: CompactionReport | None
    erased: tuple[str, ...]
    garbage: Garbage
    held: dict[str, list[str]]
    serving: str | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "dry_run": self.dry_run,
            "compacted": asdict(self.compacted) if self.compacted else None,
            "erased": list(self.erased),
            "size_bytes": self.garbage.size_bytes,
            "objects": [asdict(finding) for finding in self.garbage.objects],
            "held": self.held,
        }


def collect_garbage(
    config: Config, console: Console, *, keep: int | None, grace_s: float, dry_run: bool, take_over: bool
) -> GarbageReport:
    """Compact the ledger, erase what was forgotten, and remove what nobody needs; with `dry_run`, only look.

    Raises:
        LeaseError: when a run works on the store, or has taken it over meanwhile.
        ConflictError: when a snapshot that was to go was put into service or pinned meanwhile; run it again.
        StoreError: when the store is damaged: nobody knows then what is needed.
    """
    store = open_store(config)
    newest = keep or config.storage.keep_snapshots
    if dry_run:
        return _clean(store, config, newest, grace_s, None)
    with hold_lease(store, new_run_id("gc"), take_over=take_over) as lease:
        done = _clean(store, config, newest, grace_s, lease)
        collect(store, done.garbage, lease.check)
    return done


def _clean(store: Store, config: Config, newest: int, grace_s: float, lease: RunLease | None) -> GarbageReport:
    """Do all but the removal of garbage; without a lease, only look."""
    # 1. Few parts, full shards, and nothing in them of what was forgotten or has left every corpus.
    compacted, erased, dry_run = None, [], lease is None
    if current_id(store):
        snapshot = load_snapshot(store)
        corpora = needed_corpora(store, store.objects(), kept_snapshots(store, newest), grace_s=grace_s)
        since = time.time() - grace_s
        compacted = compact(store, snapshot, profile_of(config), corpora, since=since, dry_run=dry_run)
        if snapshot.tombstones and lease is not None:
            erased = erase_rows(store, snapshot.tombstones, lease.check)
    # 2. What is left over.
    kept, held = snapshots_to_keep(store, newest)
    garbage = find_garbage(store, store.objects(), kept, grace_s=grace_s)
    return GarbageReport(dry_run, compacted, tuple(erased), garbage, held, current_id(store))


@dataclass(frozen=True)
class ForgetReport:
    """The passages that a command forgot or remembers again, and the snapshot that says so."""

    keys: tuple[str, ...]
    passages: tuple[KnownPassage, ...]
    snapshot: str


def forget(store: Store, names: Sequence[str], *, undo: bool) -> ForgetReport:
    """Publish a snapshot in which passages, by key or source id, must not be used any more; or may again.

    One conditional write: a run that is at work meanwhile does not publish over it, but says that it lost.

    Raises:
        InputError: when the corpus in service has no passage of such an id.
        ConflictError: when somebody published at the same time.
    """
    snapshot = load_snapshot(store)
    passages = find_passages(store, snapshot.corpus_version, names)
    keys = tuple(sorted({*(passage.key for passage in passages), *filter(is_key, names)}))
    if undo and (strange := sorted({*keys} - {*snapshot.tombstones})):
        raise InputError(f"{strange[0]} was not forgotten", "see `prag snapshots show` for what was")
    new = without_tombstones(snapshot, keys) if undo else with_tombstones(snapshot, keys)
    publish(store, new, replaces=snapshot.id)
    return ForgetReport(keys, tuple(passages), current_id(store) or "")


def list_rejects(store: Store, stage: str | None) -> list[Reject]:
    """Return the rejects of all runs, each once, by stage, reason and source; with `stage`, only those of one stage.

    Raises:
        StoreError: when they cannot be read.
    """
    parts = store.list(f"rejects/{stage}" if stage else "rejects", ".parquet")
    rows = from_table(Reject, store.get_table(Reject, parts))
    found = {(row.stage, row.reason, row.source, row.key, row.recipe): row for row in rows}
    return sorted(found.values(), key=lambda row: (row.stage, row.reason, row.source))


def retry(config: Config, *, stage: str | None, reason: str | None, take_over: bool) -> int:
    """Forget rejects, so that the next run tries these inputs again, and return how many.

    Raises:
        LeaseError: when a run works on the store.
    """
    store = open_store(config)
    with hold_lease(store, new_run_id("retry"), take_over=take_over):
        return forget_rejects(store, stage, reason)


def measure_usage(store: Store, keep: int) -> StoreUsage:
    """Count what a store holds, and what of it `prag gc` could remove now.

    Raises:
        StoreError: when the store is damaged.
    """
    objects = store.objects()
    garbage = find_garbage(store, objects, snapshots_to_keep(store, keep)[0], grace_s=0.0)
    return usage(store, objects, garbage.size_bytes)
