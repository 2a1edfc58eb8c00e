"""What nobody needs any more, and taking it away.

Needed is what a kept snapshot names, and what the newest run would resume from. Never taken are augmentations,
rejects and the folders of runs: they are small, and augmentations are the dearest thing to make again.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.errors import StoreError
from prag_core.maintenance import Finding, Kind, StoredObject, kind_of, list_snapshots, names_of, remove, serving_id
from prag_core.records import LedgerRow
from prag_core.shards import replace_rows
from prag_core.snapshot import Snapshot
from prag_core.store import Store

# A part with at most this share of rows that still count is worth writing anew, with its shards.
FEW_LIVE = 0.5
# Documents go before what they name, so that a kill leaves nothing that names what is gone.
_ORDER = ("snapshots", "corpus", "indexes", "ledger", "recipes", "starts", "shards", "scratch")


@dataclass(frozen=True)
class Garbage:
    """What can go: `objects`, in the order in which they must go, and ledger parts to be written anew.

    `rewrites` maps a ledger part to the keys of its rows that a later row has superseded. `superseded` counts all
    such rows that stay for now, because a kept snapshot names their part or too many rows beside them still count.
    """

    objects: tuple[Finding, ...]
    rewrites: dict[str, tuple[str, ...]]
    superseded: int

    @property
    def size_bytes(self) -> int:
        """The bytes of `objects`."""
        return sum(finding.size_bytes for finding in self.objects)


@dataclass(frozen=True)
class RunInputs:
    """What a run works on: its corpus version and its recipe."""

    corpus_version: str
    recipe: str


def newest_inputs(store: Store) -> RunInputs | None:
    """Return what the newest run that got as far as its corpus works on, or None when there is none."""
    names = store.list("runs", "/inputs.json")
    return RunInputs(**store.get_json(names[-1])) if names else None


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

    # 1. Ledger parts: those of other recipes, and of this recipe those whose every row was superseded.
    free = {part for part in parts if part not in named and part in old}
    foreign = {part for part in free if newest and part.split("/")[1] != newest.recipe}
    late = _superseded(store, free - foreign, [part for part in parts if part not in foreign])
    empty = {part for part, (keys, rows) in late.items() if len(keys) == rows}
    rewrites = {
        part: keys for part, (keys, rows) in late.items() if part not in empty and rows - len(keys) <= FEW_LIVE * rows
    }
    # 2. Shards: those that no part names which stays.
    stay = [part for part in parts if part not in foreign | empty]
    shards = {shard for part in stay for shard in _column(store, part, "shard").unique().to_pylist()}
    # 3. Everything else, by the folder that makes it one thing.
    recipes = {part.split("/")[1] for part in stay} | ({newest.recipe} if newest else set())
    needed = _Needed(keep, newest, recipes, _starts(store, recipes, objects), _indexes(store, keep, newest, objects))
    chosen = []
    for item in objects:
        kind = kind_of(item.name)
        found: Kind | None = None
        if kind == "scratch" or (kind == "shards" and item.name not in shards):
            found = "orphan"
        elif item.name in foreign | empty or (item.name not in named and not needed.has(kind, item.name)):
            found = "unreferenced"
        if found and item.name in old:
            chosen.append(Finding(item.name, found, _why(kind, item.name, empty), size_bytes=item.size_bytes))
    chosen.sort(key=lambda finding: (_ORDER.index(kind_of(finding.name)), _is_data(finding.name), finding.name))
    waiting = sum(len(keys) for part, (keys, _) in late.items() if part not in empty and part not in rewrites)
    return Garbage(tuple(chosen), rewrites, waiting)


def collect(store: Store, garbage: Garbage) -> None:
    """Take garbage away; killed in between, the next collection finds the rest.

    A ledger part that is written anew leaves its old shards as orphans, for the collection after the grace period:
    a reader may still hold their rows.
    """
    for part, keys in garbage.rewrites.items():
        shards = pa.table({"key": _column(store, part, "key"), "shard": _column(store, part, "shard")})
        touched = shards.filter(pc.is_in(shards["key"], value_set=pa.array(keys)))["shard"].unique().to_pylist()
        new, lost = replace_rows(store, part, dict.fromkeys(touched, keys))
        superfluous = part if set(lost) <= set(keys) else new  # a damaged shard is for `repair`, not to be dropped here
        if superfluous and new != part:
            remove(store, superfluous)
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

    def has(self, kind: str, name: str) -> bool:
        if kind == "snapshots":
            return name == "CURRENT" or posixpath.basename(name) in {f"{snapshot.id}.json" for snapshot in self.keep}
        folder = name.split("/")[1] if "/" in name else name
        if kind == "corpus":
            versions = {snapshot.corpus_version for snapshot in self.keep}
            return self.newest is None or folder in versions | {self.newest.corpus_version}
        if kind == "indexes":
            return self.newest is None or folder in self.indexes
        if kind == "recipes":
            return self.newest is None or folder in self.recipes
        if kind == "starts":
            return self.starts is None or folder.removesuffix(".safetensors") in self.starts
        return True


def _is_data(name: str) -> bool:
    return not name.endswith(".json")


def _why(kind: str, name: str, empty: Collection[str]) -> str:
    if kind == "scratch":
        return "left by a writer that was killed"
    if kind == "shards":
        return "no ledger part names it"
    return "each of its adapters was made anew" if name in empty else "no kept snapshot and not the newest run needs it"


def _column(store: Store, part: str, column: str) -> pa.ChunkedArray:
    try:
        return store.get_columns(part, [column])[column]
    except StoreError as error:
        raise StoreError(error.message, "run `prag repair` first: nobody knows which shards it names") from None


def _superseded(store: Store, free: Collection[str], parts: Iterable[str]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return, for each of the parts in `free`, the keys of its rows that a later row supersedes, and all its rows.

    Only the keys of `free` are held in memory; the rows of all parts stream past them.
    """
    rows = {part: _times(store, part) for part in sorted(free)}
    recipes = {part.split("/")[1] for part in free}
    asked: dict[tuple[str, str], tuple[float, str]] = {}
    wanted = pa.array(sorted({key for table in rows.values() for key in table["key"].to_pylist()}), pa.string())
    for part in parts:
        recipe = part.split("/")[1]
        if recipe not in recipes:
            continue
        table = rows[part] if part in rows else _times(store, part)
        table = table.filter(pc.is_in(table["key"], value_set=wanted))
        for key, created in zip(table["key"].to_pylist(), table["created"].to_pylist(), strict=True):
            # Of equal rows (a part that is being replaced) the one in the part of the greatest name counts.
            asked[recipe, key] = max(asked.get((recipe, key), (created, part)), (created, part))
    found = {}
    for part, table in rows.items():
        of_part = zip(table["key"].to_pylist(), table["created"].to_pylist(), strict=True)
        late = [key for key, created in of_part if asked[part.split("/")[1], key] > (created, part)]
        found[part] = (tuple(late), table.num_rows)
    return found


def _times(store: Store, part: str) -> pa.Table:
    try:
        return store.get_table(LedgerRow, [part], ["key", "created"])
    except StoreError as error:
        raise StoreError(error.message, "run `prag repair` first: nobody knows which adapters it names") from None


def _starts(store: Store, recipes: Collection[str], objects: Sequence[StoredObject]) -> set[str] | None:
    """The starts of the recipes; None (all) when a recipe cannot be read."""
    there = {item.name for item in objects}
    try:
        documents = [
            store.get_json(f"adapters/{r}/recipe.json") for r in recipes if f"adapters/{r}/recipe.json" in there
        ]
        return {str(document["recipe"]["train"]["start"]) for document in documents}
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


def count_by_kind(garbage: Garbage) -> dict[str, tuple[int, int]]:
    """Return objects and bytes of the garbage by kind of object."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for finding in garbage.objects:
        counts[kind_of(finding.name)] += 1
        sizes[kind_of(finding.name)] += finding.size_bytes
    return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}
