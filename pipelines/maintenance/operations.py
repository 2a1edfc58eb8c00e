"""The operator's commands on a store. Those that need more than one conditional write hold the run lease."""

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
from prag_core.config_file import read_config
from prag_core.errors import ConfigError, InputError
from prag_core.identity import is_checksum
from prag_core.maintenance.erasure import erase_rows, parts_with, snapshots_to_keep
from prag_core.maintenance.garbage import Garbage, collect, find_garbage, needed_corpora
from prag_core.maintenance.inventory import StoreUsage, count_usage, object_kind
from prag_core.maintenance.repair import RepairResult, repair
from prag_core.records import Reject, from_table
from prag_core.store.objects import Store, open_store
from prag_core.store.pins import kept_snapshots
from prag_core.store.runs import RunInputs, RunLease, find_config, hold_lease, new_run_id
from prag_core.store.snapshot import current_id, load_snapshot, publish, with_tombstones, without_tombstones
from prag_core.store.tables import PassageRef, clear_rejects, find_passages


def verify(config: Config, console: Console, *, full: bool) -> VerifyReport:
    """Check the store of a configuration; see `verify_store`."""
    return verify_store(open_store(config), profile_of(config), console, full=full)


@dataclass(frozen=True)
class RepairReport:
    """What `prag repair` found, removed, and made again. `run` is the report of the run, None if there was none."""

    verified: VerifyReport
    repaired: RepairResult | None
    run: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        repaired = asdict(self.repaired) if self.repaired else None
        return {"verified": self.verified.to_json(), "repaired": repaired, "run": self.run}


def repair_store(
    config: Config, console: Console, *, full: bool, run: bool, take_over: bool, overrides: Sequence[str] = ()
) -> RepairReport:
    """Check the store, remove damaged objects, and run the job that made the snapshot in service, to make them again.

    The job has the configuration that its run stored, with these `overrides`; `config` says where the store is and
    how to reach it. With `full`, the check reads every byte. Without `run`, the job is left to a later command.

    Raises:
        ConfigError: if the stored configuration is not valid any more.
        LeaseError: if a run works on the store.
        PragError: see `run_job`. Removed objects stay removed, and the same command continues.
    """
    from pipelines.jobs.run import run_job

    store = open_store(config)
    # The check needs the lease too, so that nobody compacts or removes what it finds.
    with hold_lease(store, new_run_id("repair"), take_over=take_over) as lease:
        verified = verify(config, console, full=full)
        if not verified.findings:
            return RepairReport(verified, None, None)
        lease.check()
        repaired = repair(store, verified.findings, lease.check)
    if not run:
        return RepairReport(verified, repaired, None)
    report = run_job(_config_of_service(store, config, console, overrides), console)
    return RepairReport(verified, repaired, report.to_json())


def _config_of_service(store: Store, config: Config, console: Console, overrides: Sequence[str]) -> Config:
    """Return the stored configuration of the run that made the snapshot in service; `config` if there is none."""
    found = None
    if current_id(store):
        snapshot = load_snapshot(store)
        found = find_config(store, RunInputs(snapshot.corpus_version, snapshot.recipe))
    if found is None:
        console.print("no run stored its configuration for the snapshot in service: the given one is used")
        return config
    id, text = found
    console.print(f"making again what was removed, with the configuration of run {id} (relative paths: from here)")
    try:
        made = read_config(text, f"{store.url}/runs/{id}/config.yaml", overrides)
    except ConfigError as error:  # of an older version, or damaged
        raise ConfigError(error.message, "run `prag run` with a configuration that makes the same") from None
    return made.model_copy(update={"store": config.store, "storage": config.storage})


@dataclass(frozen=True)
class GarbageReport:
    """What `prag gc` compacted, erased and removed, or would.

    `compacted` is None if nothing is published yet. `erased` are the parts of augmentations and rejects that were
    replaced to erase forgotten passages. `held` are the parts in which kept snapshots still hold forgotten passages,
    by snapshot id. `young` are the other parts that still hold some: a later collection removes them.
    """

    dry_run: bool
    compacted: CompactionReport | None
    erased: tuple[str, ...]
    garbage: Garbage
    held: dict[str, list[str]]
    young: tuple[str, ...]
    serving: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "dry_run": self.dry_run,
            "compacted": asdict(self.compacted) if self.compacted else None,
            "erased": list(self.erased),
            "size_bytes": self.garbage.size_bytes,
            "objects": [asdict(finding) for finding in self.garbage.objects],
            "held": self.held,
            "young": list(self.young),
        }


def collect_garbage(
    config: Config, console: Console, *, keep: int | None, grace_s: float, dry_run: bool, take_over: bool
) -> GarbageReport:
    """Compact the ledger, erase forgotten passages, and remove what nobody needs; with `dry_run`, change nothing.

    The `keep` newest snapshots stay (None: `storage.keep_snapshots`), and all objects younger than `grace_s`.

    Raises:
        LeaseError: if a run works on the store, or has taken the lease over meanwhile.
        ConflictError: if a snapshot of the garbage was put into service or pinned meanwhile; run it again.
        StoreError: if the store is damaged, because it is then unknown what is needed.
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
    """Do everything but remove the garbage. Without a lease, change nothing."""
    # 1. Compact ledger parts and shards, and erase forgotten passages.
    compacted, erased, dry_run = None, [], lease is None
    forgotten: tuple[str, ...] = ()
    if current_id(store):
        snapshot = load_snapshot(store)
        forgotten = snapshot.tombstones
        corpora = needed_corpora(store, store.objects(), kept_snapshots(store, newest), grace_s=grace_s)
        since = time.time() - grace_s
        compacted = compact(store, snapshot, profile_of(config), corpora, since=since, dry_run=dry_run)
        if forgotten and lease is not None:
            erased = erase_rows(store, forgotten, lease.check)
    # 2. Find what nobody needs now.
    kept, held = snapshots_to_keep(store, newest)
    objects = store.objects()
    garbage = find_garbage(store, objects, kept, grace_s=grace_s)
    # 3. Find where else forgotten passages stay for now.
    young: list[str] = []
    if forgotten:
        parts = {o.name for o in objects if o.name.endswith(".parquet") and object_kind(o.name) in ("corpus", "ledger")}
        parts -= {finding.name for finding in garbage.objects}.union(*held.values())
        young = parts_with(store, sorted(parts), forgotten)
    return GarbageReport(dry_run, compacted, tuple(erased), garbage, held, tuple(young), current_id(store))


@dataclass(frozen=True)
class ForgetReport:
    """The passages that `prag forget` or `prag forget --undo` named, and the id of the snapshot that it published."""

    keys: tuple[str, ...]
    passages: tuple[PassageRef, ...]
    snapshot: str


def forget(store: Store, names: Sequence[str], *, undo: bool) -> ForgetReport:
    """Publish a snapshot in which passages are forgotten; with `undo`, one in which they are not forgotten any more.

    This is one conditional write. A run that is at work does not publish over it, but ends with a `ConflictError`.

    `names` are keys or source ids.

    Raises:
        InputError: if the corpus in service has no passage with a source id, or a passage to undo was not forgotten.
        ConflictError: if somebody published at the same time.
    """
    snapshot = load_snapshot(store)
    passages = find_passages(store, snapshot.corpus_version, names)
    ids = {source for passage in passages for source in passage.sources}
    unknown = {name for name in names if is_checksum(name) and name not in ids}  # keys of an earlier corpus
    keys = tuple(sorted({*(passage.key for passage in passages), *unknown}))
    if undo and (remembered := sorted({*keys} - {*snapshot.tombstones})):
        raise InputError(f"{remembered[0]} was not forgotten", "see `prag snapshots show` for what was")
    new = without_tombstones(snapshot, keys) if undo else with_tombstones(snapshot, keys)
    publish(store, new, replaces=snapshot.id)
    return ForgetReport(keys, tuple(passages), current_id(store) or "")


def list_rejects(store: Store, stage: str | None) -> list[Reject]:
    """Return the different rejects of all runs, sorted by stage, reason and source; with `stage`, only those of one."""
    parts = store.list(f"rejects/{stage}" if stage else "rejects", ".parquet")
    rows = from_table(Reject, store.get_table(Reject, parts))
    found = {(row.stage, row.reason, row.source, row.key, row.recipe): row for row in rows}
    return sorted(found.values(), key=lambda row: (row.stage, row.reason, row.source))


def retry(config: Config, *, stage: str | None, reason: str | None, take_over: bool) -> int:
    """Clear rejects, so that the next run tries their inputs again, and return how many; see `clear_rejects`.

    Raises:
        InputError: if no reject has this reason.
        LeaseError: if a run works on the store.
    """
    store = open_store(config)
    known = {row.reason for row in list_rejects(store, stage)}
    if reason is not None and reason not in known:
        what = f"rejects of the stage {stage}" if stage else "rejects"
        raise InputError(
            f"store = {store.url!r}: none of its {what} has the reason {reason!r}",
            f"there are {', '.join(sorted(known))}" if known else "there are no such rejects",
        )
    with hold_lease(store, new_run_id("retry"), take_over=take_over):
        return clear_rejects(store, stage, reason)


def measure_usage(store: Store, keep: int) -> StoreUsage:
    """Count the objects of a store, and the bytes that `prag gc` could remove now.

    Raises:
        StoreError: if the store is damaged.
    """
    objects = store.objects()
    garbage = find_garbage(store, objects, snapshots_to_keep(store, keep)[0], grace_s=0.0)
    return count_usage(store, objects, garbage.size_bytes)
