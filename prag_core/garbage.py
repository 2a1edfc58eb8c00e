"""What nobody needs any more, and taking it away.

Needed is what a kept snapshot names, and what the newest run would resume from. Never taken are augmentations,
rejects and the folders of runs: they are small, and augmentations are the dearest thing to make again. Ledger rows
and adapters that no longer count are taken out by a compaction first (`prag_core.compaction`), which leaves whole
parts and shards to go.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from prag_core.compaction import compactions, replaced_parts
from prag_core.errors import StoreError, UnreachableError
from prag_core.identity import is_intact, seal
from prag_core.maintenance import Finding, Kind, StoredObject, kind_of, list_snapshots, names_of, remove, serving_id
from prag_core.records import from_dict
from prag_core.snapshot import Snapshot
from prag_core.store import Store

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


@dataclass(frozen=True)
class RunInputs:
    """What a run works on: its corpus version and its recipe."""

    corpus_version: str
    recipe: str


def put_inputs(store: Store, run: str, inputs: RunInputs) -> None:
    """Note what a run works on, so that no collection takes away what it would resume from."""
    store.put_json(f"runs/{run}/inputs.json", seal(asdict(inputs)))


def newest_inputs(store: Store) -> RunInputs | None:
    """Return what the newest run that got as far as its corpus works on, or None when there is none.

    Raises:
        StoreError: when its note cannot be read.
    """
    names = store.list("runs", "/inputs.json")
    if not names:
        return None
    try:
        document = store.get_json(names[-1])
        if is_intact(document):
            return from_dict(RunInputs, document)
    except UnreachableError:
        raise
    except (StoreError, TypeError, AttributeError):
        pass
    raise StoreError(f"{store.url}/{names[-1]}: altered or cut short", "run `prag repair` first")


def find_garbage(
    store: Store,
    objects: Sequence[StoredObject],
    kept: Collection[str],
    *,
    grace_s: float,
    now: float | None = None,
) -> Garbage:
    """Find what can go: nothing that a kept snapshot names, that the newest run needs, or younger than `grace_s`.

    Args:
        store: The store.
        objects: All its objects (`list_objects`).
        kept: The ids of the snapshots to keep; the one in service is always kept.
        grace_s: The least age by time of modification, so that a run's unfinished work is left alone.
        now: The time, in seconds since the epoch.

    Raises:
        StoreError: when a snapshot or a ledger part cannot be read: then nobody knows what it names.
    """
    snapshots, unreadable = list_snapshots(store)
    if unreadable:
        raise StoreError(f"{store.url}/{unreadable[0].name}: {unreadable[0].detail}", "run `prag repair` first")
    serving = serving_id(store)
    if snapshots and serving not in {snapshot.id for snapshot in snapshots}:
        raise StoreError(f"{store.url}/CURRENT: names {serving}, which is no snapshot", "run `prag repair` first")
    keep = [snapshot for snapshot in snapshots if snapshot.id in {*kept, serving}]
    newest = newest_inputs(store)
    named = {name for snapshot in keep for name in names_of(snapshot)}
    old = {item.name for item in objects if item.modified <= (time.time() if now is None else now) - grace_s}
    parts = [item.name for item in objects if kind_of(item.name) == "ledger"]

    # 1. Ledger parts: those of other recipes, and those that a compaction has replaced.
    free = {part for part in parts if part not in named and part in old}
    replaced = {part for r in {part.split("/")[1] for part in free} for part in replaced_parts(store, r, parts)}
    foreign = {part for part in free if newest and part.split("/")[1] != newest.recipe}
    gone = foreign | free & replaced
    # 2. Shards: those that no part names which stays.
    stay = [part for part in parts if part not in gone]
    shards = {shard for part in stay for shard in _shards(store, part).unique().to_pylist()}
    # 3. Everything else, by the folder that makes it one thing.
    recipes = {part.split("/")[1] for part in stay} | ({newest.recipe} if newest else set())
    needed = _Needed(
        keep,
        newest,
        recipes,
        _starts(store, recipes, objects),
        _indexes(store, keep, newest, objects),
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


def collect(store: Store, garbage: Garbage) -> None:
    """Take garbage away; killed in between, the next collection finds the rest.

    Raises:
        StoreError: when an object cannot be removed.
    """
    for finding in garbage.objects:
        remove(store, finding.name)


@dataclass(frozen=True)
class _Needed:
    """What is needed beside what kept snapshots name themselves."""

    keep: Sequence[Snapshot]
    newest: RunInputs | None
    recipes: Collection[str]
    starts: Collection[str] | None
    indexes: Collection[str]
    compactions: Collection[str]

    def has(self, kind: str, name: str) -> bool:
        if kind == "snapshots":
            return "/" not in name or posixpath.basename(name) in {f"{snapshot.id}.json" for snapshot in self.keep}
        folder = name.split("/")[1] if "/" in name else name
        if kind == "corpus":
            versions = {snapshot.corpus_version for snapshot in self.keep}
            return self.newest is None or folder in versions | {self.newest.corpus_version}
        if kind == "indexes":
            return self.newest is None or folder in self.indexes
        if kind == "recipes":
            return self.newest is None or folder in self.recipes
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
    return "its rows stand in another part" if name in replaced else "no kept snapshot and not the newest run needs it"


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
    """The starts of the recipes; None (all) when a recipe cannot be read."""
    there = {item.name for item in objects}
    try:
        documents = [
            store.get_json(f"adapters/{r}/recipe.json") for r in recipes if f"adapters/{r}/recipe.json" in there
        ]
        return {str(document["recipe"]["train"]["start"]) for document in documents}
    except UnreachableError:
        raise
    except (StoreError, KeyError, TypeError):
        return None


def _indexes(
    store: Store, keep: Sequence[Snapshot], newest: RunInputs | None, objects: Sequence[StoredObject]
) -> set[str]:
    """The indexes of kept snapshots and of the newest run's corpus, by their `index.json`."""
    indexes = {snapshot.index for snapshot in keep}
    for item in objects:
        if newest and kind_of(item.name) == "indexes" and item.name.endswith("/index.json"):
            try:
                if store.get_json(item.name)["corpus_version"] == newest.corpus_version:
                    indexes.add(item.name.split("/")[1])
            except UnreachableError:
                raise
            except (StoreError, KeyError, TypeError):
                continue  # `repair` removes it; an archive without it is nobody's
    return indexes


def parse_age(text: str) -> float:
    """Return an age such as `24h`, `90m`, `7d` or `30s` in seconds.

    Raises:
        ValueError: when it is none.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if not text[:-1].replace(".", "", 1).isdigit() or text[-1:] not in units:
        raise ValueError(f"{text!r} is no age: write 30s, 90m, 24h or 7d")
    return float(text[:-1]) * units[text[-1]]
