"""Garbage: the objects of a store that nobody needs, and their removal.

Needed are the objects that a kept snapshot names, all ledger parts of the recipes of these snapshots that have not
been replaced, and everything from which the newest run, or a run that has written within the grace period, would
resume. Evaluations of kept snapshots are needed too: others have answers that nobody can ask for again, perhaps about
forgotten passages. Augmentations, rejects and the folders of runs are never garbage: they are small, and augmentations
cost the most to make again. A compaction (`prag_core.maintenance.compaction`) comes first. It takes out single ledger
rows and adapters that nobody needs, and leaves whole parts and shards for the collection.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from prag_core.errors import REPAIR, ConflictError, DamagedError, StoreError
from prag_core.maintenance.inventory import Finding, FindingKind, check_snapshots, names_of, object_kind, serving_id
from prag_core.records import from_dict
from prag_core.store.backend import StoredObject
from prag_core.store.ledger import compactions, replaced_parts
from prag_core.store.objects import Store
from prag_core.store.pins import PINS, pinned
from prag_core.store.runs import RunInputs
from prag_core.store.snapshot import (
    CURRENT,
    Snapshot,
    answers_of,
    current_id,
    document_name,
    load_snapshot,
    snapshot_id,
)

# The order of removal. A document goes before the objects that it names, so that after a kill no document names an
# object that is gone. But the record of a compaction goes after the parts that it replaced: without it they would
# count again.
_ORDER = (
    "snapshots",
    "evaluations",
    "corpus",
    "indexes",
    "ledger",
    "compactions",
    "recipes",
    "starts",
    "shards",
    "scratch",
)
# The folder of a judge's verdicts: they name what was judged by hashes alone, for all evaluations.
_VERDICTS = "verdicts"


@dataclass(frozen=True)
class Garbage:
    """The objects to remove, in the order of removal."""

    objects: tuple[Finding, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all `objects`."""
        return sum(finding.size_bytes for finding in self.objects)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Return the number of objects and their bytes, by kind of object."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for finding in self.objects:
            counts[object_kind(finding.name)] += 1
            sizes[object_kind(finding.name)] += finding.size_bytes
        return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


def recent_inputs(store: Store, objects: Sequence[StoredObject], since: float) -> list[RunInputs]:
    """Return the inputs of the newest run, and of each run that has written anything after `since`.

    A run has inputs once it has stored its corpus.

    Raises:
        StoreError: if the inputs of a run cannot be read.
    """
    last_written: dict[str, float] = {}
    for item in objects:
        run, _, file = item.name.removeprefix("runs/").partition("/")
        if object_kind(item.name) == "runs" and file:
            last_written[run] = max(last_written.get(run, 0.0), item.modified)
    names = {item.name for item in objects}
    runs = [run for run in sorted(last_written) if f"runs/{run}/inputs.json" in names]
    recent = [run for run in runs if run == runs[-1] or last_written[run] > since]
    documents = [store.get_sealed(f"runs/{run}/inputs.json", "corpus_version", "recipe") for run in recent]
    return [from_dict(RunInputs, document) for document in documents]


def needed_corpora(
    store: Store, objects: Sequence[StoredObject], kept: Collection[str], *, grace_s: float
) -> list[str]:
    """Return the versions of the corpora whose passages keep their adapters: those of kept snapshots and recent runs.

    Raises:
        StoreError: if a snapshot or the inputs of a run cannot be read.
    """
    versions = {snapshot.corpus_version for snapshot in _snapshots(store) if snapshot.id in kept}
    names = {item.name for item in objects}
    for inputs in recent_inputs(store, objects, time.time() - grace_s):
        if f"corpus/{inputs.corpus_version}/manifest.json" in names:  # else a repair removed it: the next run makes it
            versions.add(inputs.corpus_version)
    return sorted(versions)


def _snapshots(store: Store) -> list[Snapshot]:
    snapshots, unreadable = check_snapshots(store)
    if unreadable:
        raise StoreError(f"{store.url}/{unreadable[0].name}: {unreadable[0].detail}", REPAIR)
    return snapshots


def find_garbage(store: Store, objects: Sequence[StoredObject], kept: Collection[str], *, grace_s: float) -> Garbage:
    """Find the objects that no kept snapshot and no recent run needs, and that are older than `grace_s`.

    Args:
        store: The store.
        objects: All its objects (`Store.objects`).
        kept: The ids of the snapshots to keep; the one in service is always kept.
        grace_s: The least age of garbage since its last write, so that unfinished work stays.

    Raises:
        StoreError: if a snapshot or a ledger part cannot be read, because the objects that it names are then unknown.
    """
    snapshots = _snapshots(store)
    serving = serving_id(store)
    if snapshots and serving not in {snapshot.id for snapshot in snapshots}:
        raise StoreError(f"{store.url}/CURRENT: names {serving}, which is no snapshot", REPAIR)
    since = time.time() - grace_s
    old = {item.name for item in objects if item.modified <= since}
    # A young snapshot stays, and so must all that it names.
    keep = [s for s in snapshots if s.id in {*kept, serving} or document_name(s.id) not in old]
    runs = recent_inputs(store, objects, since)
    alive = {snapshot.recipe for snapshot in keep} | {inputs.recipe for inputs in runs}
    named = {name for snapshot in keep for name in names_of(snapshot)}
    parts = [item.name for item in objects if object_kind(item.name) == "ledger"]

    # 1. Ledger parts of recipes that nobody uses, and those that a compaction has replaced.
    unnamed = {part for part in parts if part not in named and part in old}
    replaced = {part for r in {part.split("/")[1] for part in unnamed} for part in replaced_parts(store, r, parts)}
    unused = {part for part in unnamed if runs and part.split("/")[1] not in alive}
    unneeded = unused | unnamed & replaced
    # 2. Shards that no remaining part names.
    remaining = [part for part in parts if part not in unneeded]
    shards = {shard for part in remaining for shard in _shards(store, part).unique().to_pylist()}
    # 3. Everything else, by its folder.
    recipes = {part.split("/")[1] for part in remaining} | alive
    corpora = {snapshot.corpus_version for snapshot in keep} | {inputs.corpus_version for inputs in runs}
    needed: dict[str, Collection[str] | None] = {
        "snapshots": {snapshot.id for snapshot in keep},
        "corpus": corpora if runs else None,
        "indexes": _indexes(store, keep, corpora, objects) if runs else None,
        "recipes": recipes if runs else None,
        "starts": _starts(store, recipes, objects),
        "evaluations": _evaluations(store, keep, objects),
        "compactions": _effective_compactions(store, recipes, remaining),
    }
    chosen = []
    for item in objects:
        kind = object_kind(item.name)
        found: FindingKind | None = None
        if kind == "scratch" or (kind == "shards" and item.name not in shards):
            found = "orphan"
        elif item.name in unneeded or (item.name not in named and not _is_needed(kind, item.name, needed)):
            found = "unreferenced"
        if found and item.name in old:
            chosen.append(Finding(item.name, found, _reason(kind, item.name, replaced), size_bytes=item.size_bytes))
    chosen.sort(key=lambda f: (_ORDER.index(object_kind(f.name)), not f.name.endswith(".json"), f.name))
    return Garbage(tuple(chosen))


def collect(store: Store, garbage: Garbage, check: Callable[[], None] = lambda: None) -> None:
    """Remove garbage. After a kill, the next collection finds the rest.

    Meanwhile somebody may put a snapshot into service, or pin it, which needs no lease. So the documents of snapshots
    go first, and the objects that they name only if nobody did so. `rollback` and `pin` check after their write that
    the document still exists.

    `check` is called before the documents of snapshots and before each other object; it raises if the lease is lost.

    Raises:
        ConflictError: if a snapshot of the garbage was put into service or pinned; it stays, with all that it names.
        StoreError: if an object cannot be removed.
    """
    names = [finding.name for finding in garbage.objects]
    documents = {name: store.get_if_exists(name) for name in names if object_kind(name) == "snapshots"}
    _check_unused(store, names)
    check()
    try:
        for name in documents:
            store.remove(name)
        _check_unused(store, names)
    except StoreError:
        for name, data in documents.items():
            if data is not None:
                store.put(name, data)
        raise
    for name in names:
        if name not in documents:
            check()
            store.remove(name)


def _check_unused(store: Store, names: Collection[str]) -> None:
    going = {*names}
    for id in filter(None, {*pinned(store), current_id(store)}):
        document = document_name(id)
        # A rollback over tombstones makes a new snapshot, which names the same objects as the old one.
        if document in going or (store.exists(document) and going & {*names_of(load_snapshot(store, id))}):
            raise ConflictError(
                f"store = {store.url!r}: the snapshot {id} was garbage, but was put into service or pinned meanwhile",
                "nothing that it names was removed; run `prag gc` again",
            )


def _is_needed(kind: str, name: str, needed: Mapping[str, Collection[str] | None]) -> bool:
    """Return whether an object is needed. None stands for all objects of a kind: it is unknown which are needed."""
    names = needed.get(kind)
    if names is None or name in (CURRENT, PINS):
        return True
    if kind == "compactions":
        return name in names
    if kind == "snapshots":
        return snapshot_id(name) in names
    folder = name.partition("/")[2].partition("/")[0]
    return (posixpath.splitext(folder)[0] if kind == "starts" else folder) in names


def _reason(kind: str, name: str, replaced: Collection[str]) -> str:
    if kind == "scratch":
        return "left by a writer that was killed"
    if kind == "shards":
        return "no ledger part names it"
    if kind == "compactions":
        return "the parts that it replaced are gone"
    return "its rows are in another part" if name in replaced else "no kept snapshot and no recent run needs it"


def _shards(store: Store, part: str) -> pa.ChunkedArray:
    try:
        return store.get_part(part, ["shard"])["shard"]
    except DamagedError as error:
        raise StoreError(f"{error.message}; the shards that it names are unknown", REPAIR) from None


def _effective_compactions(store: Store, recipes: Collection[str], remaining: Collection[str]) -> set[str]:
    """Return the names of the compaction records that replace a remaining part."""
    return {
        name
        for recipe in recipes
        for name, compaction in compactions(store, recipe).items()
        if {*compaction.replaces} & {*remaining}
    }


def _starts(store: Store, recipes: Collection[str], objects: Sequence[StoredObject]) -> set[str] | None:
    """Return the needed starts: those of the recipes, and the readers and writers, which only configurations name.

    None if a document cannot be read; then all starts are needed.
    """
    names = {item.name for item in objects}
    notes = [name for name in names if object_kind(name) == "starts" and name.endswith(".json")]
    try:
        documents = [
            store.get_json(f"adapters/{r}/recipe.json") for r in recipes if f"adapters/{r}/recipe.json" in names
        ]
        starts = {str(document["recipe"]["train"]["start"]) for document in documents}
        settings = {name: store.get_json(name).get("settings", {}) for name in notes}
        named = [name for name, given in settings.items() if given.get("reading") or given.get("asking")]
        return starts | {posixpath.basename(name).removesuffix(".json") for name in named}
    except (DamagedError, KeyError, TypeError, AttributeError):
        return None


def _evaluations(store: Store, keep: Sequence[Snapshot], objects: Sequence[StoredObject]) -> set[str]:
    """Return the folders of the evaluations of kept snapshots, and that of the verdicts."""
    wanted = [answers_of(snapshot) for snapshot in keep]
    needed = {_VERDICTS}
    for item in objects:
        if object_kind(item.name) == "evaluations" and posixpath.basename(item.name) == "about.json":
            try:
                if store.get_json(item.name).get("answers_of") in wanted:
                    needed.add(item.name.split("/")[1])
            except (DamagedError, AttributeError):
                continue  # nobody knows what it evaluated
    return needed


def _indexes(
    store: Store, keep: Sequence[Snapshot], corpora: Collection[str], objects: Sequence[StoredObject]
) -> set[str]:
    """Return the ids of the indexes of kept snapshots and of these corpora."""
    indexes = {snapshot.index for snapshot in keep}
    for item in objects:
        if object_kind(item.name) == "indexes" and item.name.endswith("/index.json"):
            try:
                if store.get_json(item.name)["corpus_version"] in corpora:
                    indexes.add(item.name.split("/")[1])
            except (DamagedError, KeyError, TypeError):
                continue  # `prag repair` removes it, and its archive is then garbage
    return indexes
