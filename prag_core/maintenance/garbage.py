"""What nobody needs any more, and taking it away.

Needed is what a kept snapshot names, all ledger parts that count of the recipes of these snapshots, and what the
newest run would resume from, as well as each run that has shown itself within the grace period. Never taken are
augmentations, rejects and the folders of runs: they are small, and augmentations are the dearest thing to make again.
Ledger rows and adapters that no longer count are taken out by a compaction first (`prag_core.maintenance.compaction`), which
leaves whole parts and shards to go.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from prag_core.errors import ConflictError, StoreError, UnreachableError
from prag_core.identity import is_intact
from prag_core.maintenance.inventory import Finding, Kind, kind_of, list_snapshots, names_of, serving_id
from prag_core.records import from_dict
from prag_core.store.backend import StoredObject
from prag_core.store.ledger import compactions, replaced_parts
from prag_core.store.objects import Store
from prag_core.store.runs import RunInputs
from prag_core.store.snapshot import Snapshot, current_id, load_snapshot, pinned

# Documents go before what they name, so that a kill leaves nothing that names what is gone; but a compaction goes
# after the parts that it replaced, which would count again without it.
_ORDER = ("snapshots", "corpus", "indexes", "ledger", "compactions", "recipes", "starts", "shards", "scratch")


@dataclass(frozen=True)
class Garbage:
    """What can go: `objects`, in the order in which they must go."""

    objects: tuple[Finding, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of `objects`."""
        return sum(finding.size_bytes for finding in self.objects)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Return how many objects, and how many bytes, by kind of object."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for finding in self.objects:
            counts[kind_of(finding.name)] += 1
            sizes[kind_of(finding.name)] += finding.size_bytes
        return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


def recent_inputs(store: Store, objects: Sequence[StoredObject], since: float) -> list[RunInputs]:
    """Return what runs work on that got as far as their corpus: the newest, and all that wrote anything after `since`.

    Raises:
        StoreError: when the note of one cannot be read.
    """
    seen: dict[str, float] = {}
    for item in objects:
        folder, _, file = item.name.removeprefix("runs/").partition("/")
        if kind_of(item.name) == "runs" and file:
            seen[folder] = max(seen.get(folder, 0.0), item.modified)
    there = {item.name for item in objects}
    runs = [run for run in sorted(seen) if f"runs/{run}/inputs.json" in there]
    return [_inputs(store, f"runs/{run}/inputs.json") for run in runs if run == runs[-1] or seen[run] > since]


def _inputs(store: Store, name: str) -> RunInputs:
    try:
        document = store.get_json(name)
        if is_intact(document):
            return from_dict(RunInputs, document)
    except UnreachableError:
        raise
    except (StoreError, TypeError, AttributeError):
        pass
    raise StoreError(f"{store.url}/{name}: altered or cut short", "run `prag repair` first")


def needed_corpora(
    store: Store, objects: Sequence[StoredObject], kept: Collection[str], *, grace_s: float
) -> list[str]:
    """Return the versions of the corpora whose passages' adapters are needed: those of kept snapshots and recent runs.

    Raises:
        StoreError: when a snapshot or the note of a run cannot be read.
    """
    versions = {snapshot.corpus_version for snapshot in _snapshots(store) if snapshot.id in kept}
    there = {item.name for item in objects}
    for inputs in recent_inputs(store, objects, time.time() - grace_s):
        if f"corpus/{inputs.corpus_version}/manifest.json" in there:  # it may have been damaged, and await the next run
            versions.add(inputs.corpus_version)
    return sorted(versions)


def _snapshots(store: Store) -> list[Snapshot]:
    snapshots, unreadable = list_snapshots(store)
    if unreadable:
        raise StoreError(f"{store.url}/{unreadable[0].name}: {unreadable[0].detail}", "run `prag repair` first")
    return snapshots


def find_garbage(
    store: Store,
    objects: Sequence[StoredObject],
    kept: Collection[str],
    *,
    grace_s: float,
    now: float | None = None,
) -> Garbage:
    """Find what can go: nothing that a kept snapshot or a recent run needs, and nothing younger than `grace_s`.

    Args:
        store: The store.
        objects: All its objects (`Store.objects`).
        kept: The ids of the snapshots to keep; the one in service is always kept.
        grace_s: The least age by time of modification, so that a run's unfinished work is left alone.
        now: The time, in seconds since the epoch.

    Raises:
        StoreError: when a snapshot or a ledger part cannot be read: then nobody knows what it names.
    """
    snapshots = _snapshots(store)
    serving = serving_id(store)
    if snapshots and serving not in {snapshot.id for snapshot in snapshots}:
        raise StoreError(f"{store.url}/CURRENT: names {serving}, which is no snapshot", "run `prag repair` first")
    since = (time.time() if now is None else now) - grace_s
    old = {item.name for item in objects if item.modified <= since}
    # A young one stays, and then what it names must stay too.
    keep = [s for s in snapshots if s.id in {*kept, serving} or f"snapshots/{s.id}.json" not in old]
    runs = recent_inputs(store, objects, since)
    alive = {snapshot.recipe for snapshot in keep} | {inputs.recipe for inputs in runs}
    named = {name for snapshot in keep for name in names_of(snapshot)}
    parts = [item.name for item in objects if kind_of(item.name) == "ledger"]

    # 1. Ledger parts: those of recipes that nobody works with, and those that a compaction has replaced.
    free = {part for part in parts if part not in named and part in old}
    replaced = {part for r in {part.split("/")[1] for part in free} for part in replaced_parts(store, r, parts)}
    foreign = {part for part in free if runs and part.split("/")[1] not in alive}
    gone = foreign | free & replaced
    # 2. Shards: those that no part names which stays.
    stay = [part for part in parts if part not in gone]
    shards = {shard for part in stay for shard in _shards(store, part).unique().to_pylist()}
    # 3. Everything else, by the folder that makes it one thing.
    recipes = {part.split("/")[1] for part in stay} | alive
    corpora = {snapshot.corpus_version for snapshot in keep} | {inputs.corpus_version for inputs in runs}
    needed = _Needed(
        {snapshot.id for snapshot in keep},
        not runs,
        corpora,
        recipes,
        _starts(store, recipes, objects),
        _indexes(store, keep, corpora, objects),
        _at_work(store, recipes, stay),
    )
    chosen = []
    for item in objects:
        kind = kind_of(item.name)
        found: Kind | None = None
        if kind == "scratch" or (kind == "shards" and item.name not in shards):
            found = "orphan"
        elif item.name in gone or (item.name not in named and not needed.has(kind, item.name)):
            found = "unreferenced"
        if found and item.name in old:
            chosen.append(Finding(item.name, found, _why(kind, item.name, replaced), size_bytes=item.size_bytes))
    chosen.sort(key=lambda finding: (_ORDER.index(kind_of(finding.name)), _is_data(finding.name), finding.name))
    return Garbage(tuple(chosen))


def collect(store: Store, garbage: Garbage, check: Callable[[], None] = lambda: None) -> None:
    """Take garbage away; killed in between, the next collection finds the rest.

    Somebody may put a snapshot into service or pin it meanwhile, which needs no lease. So the documents of snapshots
    go first, and what they name only when neither is so; `rollback` and `pin`, for their part, look for the document
    after their write.

    `check` is called before these and before each other removal, and raises when the store's lease is lost.

    Raises:
        ConflictError: when a snapshot that was to go is in service or pinned by now; it stays, with all that it names.
        StoreError: when an object cannot be removed.
    """
    names = [finding.name for finding in garbage.objects]
    documents = {name: store.get_if_exists(name) for name in names if kind_of(name) == "snapshots"}
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
    for id in {*pinned(store), current_id(store)} - {None}:
        document = f"snapshots/{id}.json"
        # Rolling back over tombstones makes a new snapshot, which names what the old one did.
        if document in going or (store.exists(document) and going & {*names_of(load_snapshot(store, id))}):
            raise ConflictError(
                f"store = {store.url!r}: the snapshot {id}, which was to go, was put into service or pinned meanwhile",
                "nothing that it names was removed; run `prag gc` again",
            )


@dataclass(frozen=True)
class _Needed:
    """What is needed beside what kept snapshots name themselves; `everything`: no run says what it works on."""

    snapshots: Collection[str]
    everything: bool
    corpora: Collection[str]
    recipes: Collection[str]
    starts: Collection[str] | None
    indexes: Collection[str]
    compactions: Collection[str]

    def has(self, kind: str, name: str) -> bool:
        if kind == "snapshots":
            id = posixpath.basename(name).removesuffix(".json").removesuffix(".candidate")
            return "/" not in name or id in self.snapshots
        folder = name.split("/")[1] if "/" in name else name
        if kind == "corpus":
            return self.everything or folder in self.corpora
        if kind == "indexes":
            return self.everything or folder in self.indexes
        if kind == "recipes":
            return self.everything or folder in self.recipes
        if kind == "compactions":
            return name in self.compactions
        if kind == "starts":
            return self.starts is None or posixpath.splitext(folder)[0] in self.starts
        return True


def _is_data(name: str) -> bool:
    return not name.endswith(".json")


def _why(kind: str, name: str, replaced: Collection[str]) -> str:
    if kind == "scratch":
        return "left by a writer that was killed"
    if kind == "shards":
        return "no ledger part names it"
    if kind == "compactions":
        return "the parts that it replaced are gone"
    return "its rows stand in another part" if name in replaced else "no kept snapshot and no recent run needs it"


def _shards(store: Store, part: str) -> pa.ChunkedArray:
    try:
        return store.get_part(part, ["shard"])["shard"]
    except UnreachableError:
        raise
    except StoreError as error:
        raise StoreError(error.message, "run `prag repair` first: nobody knows which shards it names") from None


def _at_work(store: Store, recipes: Collection[str], stay: Collection[str]) -> set[str]:
    """The compactions that hide a part which stays."""
    return {
        name
        for recipe in recipes
        for name, compaction in compactions(store, recipe).items()
        if {*compaction.replaces} & {*stay}
    }


def _starts(store: Store, recipes: Collection[str], objects: Sequence[StoredObject]) -> set[str] | None:
    """The starts of the recipes, and the readers, which configurations name; None (all) when one cannot be read."""
    there = {item.name for item in objects}
    notes = [name for name in there if kind_of(name) == "starts" and name.endswith(".json")]
    try:
        documents = [
            store.get_json(f"adapters/{r}/recipe.json") for r in recipes if f"adapters/{r}/recipe.json" in there
        ]
        starts = {str(document["recipe"]["train"]["start"]) for document in documents}
        readers = [name for name in notes if store.get_json(name).get("settings", {}).get("reading")]
        return starts | {posixpath.basename(name).removesuffix(".json") for name in readers}
    except UnreachableError:
        raise
    except (StoreError, KeyError, TypeError, AttributeError):
        return None


def _indexes(
    store: Store, keep: Sequence[Snapshot], corpora: Collection[str], objects: Sequence[StoredObject]
) -> set[str]:
    """The indexes of kept snapshots and of these corpora, by their `index.json`."""
    indexes = {snapshot.index for snapshot in keep}
    for item in objects:
        if kind_of(item.name) == "indexes" and item.name.endswith("/index.json"):
            try:
                if store.get_json(item.name)["corpus_version"] in corpora:
                    indexes.add(item.name.split("/")[1])
            except UnreachableError:
                raise
            except (StoreError, KeyError, TypeError):
                continue  # `repair` removes it; an archive without it is nobody's
    return indexes
