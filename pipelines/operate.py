"""What an operator does to a store. What changes it holds the run's lease; what is one conditional write needs none."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.maintain import Compacted, Verified, compact, verify_store
from pipelines.profiles import profile_of
from prag_core.config import Config
from prag_core.errors import InputError
from prag_core.forgetting import Known, erase_rows, find_passages, is_key, snapshots_to_keep
from prag_core.garbage import Garbage, collect, find_garbage, needed_corpora
from prag_core.lease import Lease, hold_lease
from prag_core.maintenance import Usage, list_objects, usage
from prag_core.records import LedgerRow, to_table
from prag_core.repair import Repaired, forget_rejects, repair
from prag_core.snapshot import (
    current_id,
    kept_snapshots,
    load_snapshot,
    publish,
    with_ledger,
    with_tombstones,
    without_tombstones,
)
from prag_core.store import Store, open_store


def verify(config: Config, console: Console, *, full: bool) -> Verified:
    """Check the store of a configuration; see `verify_store`."""
    return verify_store(open_store(config), profile_of(config), console, full=full)


@dataclass(frozen=True)
class Mended:
    """What `prag repair` found, took out, and made again (`run` is that run's report, None when none was needed)."""

    verified: Verified
    repaired: Repaired | None
    run: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        repaired = asdict(self.repaired) if self.repaired else None
        return {"verified": self.verified.to_json(), "repaired": repaired, "run": self.run}


def mend(config: Config, console: Console, *, full: bool, run: bool, take_over: bool) -> Mended:
    """Check the store, take out what is damaged, and make it again by a run of this configuration.

    Raises:
        LeaseError: when a run works on the store.
        PragError: see `run_job`; what was taken out by then stays out, and the same command goes on.
    """
    from pipelines.job import run_job

    store = open_store(config)
    # Under the lease from the first look on: nobody compacts or collects what is found meanwhile.
    with hold_lease(store, _name("repair"), take_over=take_over) as lease:
        verified = verify(config, console, full=full)
        if not verified.findings:
            return Mended(verified, None, None)
        lease.check()
        repaired = repair(store, verified.findings, lease.check)
    report = run_job(config, console).to_json() if run else None
    return Mended(verified, repaired, report)


@dataclass(frozen=True)
class Collected:
    """What `prag gc` compacted, erased and removed, or would.

    `held` are forgotten passages' bytes that stay, by the kept snapshot that names them.
    """

    dry_run: bool
    compacted: Compacted | None
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


def clean(
    config: Config, console: Console, *, keep: int | None, grace_s: float, dry_run: bool, take_over: bool
) -> Collected:
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
    with hold_lease(store, _name("gc"), take_over=take_over) as lease:
        done = _clean(store, config, newest, grace_s, lease)
        collect(store, done.garbage, lease.check)
    return done


def _clean(store: Store, config: Config, newest: int, grace_s: float, lease: Lease | None) -> Collected:
    """Do all but the removal of garbage; without a lease, only look."""
    # 1. Few parts, full shards, and nothing in them of what was forgotten or has left every corpus.
    compacted, erased, dry_run = None, [], lease is None
    if current_id(store):
        snapshot = load_snapshot(store)
        corpora = needed_corpora(store, list_objects(store), kept_snapshots(store, newest), grace_s=grace_s)
        since = time.time() - grace_s
        compacted = compact(store, snapshot, profile_of(config), corpora, since=since, dry_run=dry_run)
        if snapshot.tombstones and lease is not None:
            erased = erase_rows(store, snapshot.tombstones, lease.check)
    # 2. What is left over.
    kept, held = snapshots_to_keep(store, newest)
    garbage = find_garbage(store, list_objects(store), kept, grace_s=grace_s)
    return Collected(dry_run, compacted, tuple(erased), garbage, held, current_id(store))


@dataclass(frozen=True)
class Forgotten:
    """The passages that a command forgot or remembers again, and the snapshot that says so."""

    keys: tuple[str, ...]
    passages: tuple[Known, ...]
    snapshot: str


def forget(store: Store, names: Sequence[str], *, undo: bool) -> Forgotten:
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
    return Forgotten(keys, tuple(passages), current_id(store) or "")


def retry(config: Config, *, stage: str | None, reason: str | None, take_over: bool) -> int:
    """Forget rejects, so that the next run tries these inputs again, and return how many.

    Raises:
        LeaseError: when a run works on the store.
    """
    store = open_store(config)
    with hold_lease(store, _name("retry"), take_over=take_over):
        return forget_rejects(store, stage, reason)


def one_key(store: Store, corpus_version: str, name: str) -> str:
    """Return the key of the one passage that a name gives, by key or source id.

    Raises:
        InputError: when there is none, or a source's text became several passages.
    """
    passages = find_passages(store, corpus_version, [name])
    if len(passages) > 1:
        keys = ", ".join(passage.key for passage in passages[:5])
        raise InputError(f"the id {name!r} has {len(passages)} passages", f"give a key: {keys}")
    return passages[0].key if passages else name


def export(config: Config, name: str, folder: Path, snapshot_id: str | None) -> str:
    """Write a passage's adapter as a PEFT folder and return the passage's key.

    Raises:
        InputError: when there is no such passage, it was forgotten, or the folder holds something.
        AdapterError: when the passage has no adapter, or it is damaged.
    """
    from prag_core.adapter_io import export_peft
    from prag_core.adapter_store import find_row, open_adapters
    from prag_core.models import PACKAGED, resolve_model

    store = open_store(config)
    snapshot = load_snapshot(store, snapshot_id)
    key = one_key(store, snapshot.corpus_version, name)
    if key in load_snapshot(store).tombstones:
        raise InputError(f"{name}: was forgotten", "see `prag forget --help`")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder", "name another with --to")
    adapters, _ = open_adapters(store, snapshot.recipe)
    factors = adapters.fetch(find_row(store, snapshot.ledger_parts, key))
    model = config.model.name
    if model in PACKAGED or Path(model).is_dir():
        model = str(resolve_model(model).resolve())
    export_peft(adapters.layout, factors, folder, model)
    return key


def import_adapter(config: Config, name: str, folder: Path, take_over: bool) -> tuple[str, str]:
    """Make a PEFT folder the adapter of a passage, and return the passage's key and the snapshot that names it.

    It takes the place of what was trained, until the passage's augmentation changes.

    Raises:
        InputError: when the corpus in service has no such passage, or no run has augmented it.
        AdapterError: when the folder holds no adapter of the recipe's shape.
        LeaseError: when a run works on the store.
    """
    from prag_core.adapter_io import import_peft
    from prag_core.adapter_store import AdapterStore, open_adapters
    from prag_core.trainer import TrainedAdapter

    store = open_store(config)
    with hold_lease(store, _name("import"), take_over=take_over):
        snapshot = load_snapshot(store)
        key = one_key(store, snapshot.corpus_version, name)
        if key in snapshot.tombstones:
            raise InputError(f"{name}: was forgotten", "see `prag forget --help`")
        found, _ = open_adapters(store, snapshot.recipe)
        adapters = AdapterStore(store, found.recipe, found.layout, config.storage.adapter_dtype)
        trained = TrainedAdapter(key, import_peft(adapters.layout, folder), 0, 0, 0.0, 0.0, 0.0)
        rows = adapters.commit([(trained, _augmentation(store, adapters.recipe.augment.fingerprint, key))])
        part = store.put_table(f"{adapters.folder}/ledger", to_table(LedgerRow, rows))  # the same again: its name
        had = any(key in store.get_columns(p, ["key"])["key"].to_pylist() for p in snapshot.ledger_parts)
        new = with_ledger(snapshot, {*snapshot.ledger_parts, part}, snapshot.adapters + (not had))
        publish(store, new, replaces=snapshot.id)
    return key, new.id


def _augmentation(store: Store, recipe: str, key: str) -> str:
    """The digest of a passage's augmentation: of several, the smallest counts, as for a run."""
    digests = []
    for part in store.list(f"augmentations/{recipe}", ".parquet"):
        table = store.get_columns(part, ["key", "digest"])
        digests += [d for k, d in zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True) if k == key]
    if not digests:
        raise InputError(
            f"passage {key} has no augmentation, so the next run would train it anew",
            "run `prag run` with an augmentation for it first, then import",
        )
    return min(digests)


def measure(store: Store, keep: int) -> Usage:
    """Count what a store holds, and what of it `prag gc` could remove now.

    Raises:
        StoreError: when the store is damaged.
    """
    objects = list_objects(store)
    garbage = find_garbage(store, objects, snapshots_to_keep(store, keep)[0], grace_s=0.0)
    return usage(store, objects, garbage.size_bytes)


def _name(verb: str) -> str:
    return f"{verb}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
