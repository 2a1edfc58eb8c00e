"""Forgotten passages: who they are, what still holds them, and taking them out of small tables.

A tombstone in the snapshot in service ends a passage's use at once. Its bytes go later: a run makes a corpus and an
index without it, a compaction its ledger rows and adapters, and what is here the augmentations and rejects; `gc`
then removes the old objects. Objects are immutable, so each step writes without it before it removes what had it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.errors import InputError, StoreError
from prag_core.identity import KEY_BYTES, is_intact
from prag_core.maintenance import remove
from prag_core.snapshot import Snapshot, current_id, forgotten_now, kept_snapshots, load_snapshot, pinned
from prag_core.store import Store

_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")
# Tables with a row a passage, beside the corpus and the ledger.
_TABLES = ("augmentations", "rejects")


def forgotten_keys(store: Store, snapshot: Snapshot) -> tuple[str, ...]:
    """Return the keys that must not be used when answering from a snapshot: its own tombstones and later ones.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    return tuple(sorted({*snapshot.tombstones} | forgotten_now(store)))


@dataclass(frozen=True)
class Known:
    """A passage of a corpus version, without its text."""

    key: str
    title: str
    sources: tuple[str, ...]


def find_passages(store: Store, corpus_version: str, names: Sequence[str]) -> list[Known]:
    """Return the passages of a corpus version that `names` give, by key or by the id under which a source has them.

    Raises:
        InputError: when a name is the id of none. A key of none is none of the corpus any more, and left out.
        StoreError: when the corpus cannot be read.
    """
    found: list[Known] = []
    wanted = pa.array(sorted(set(names)), pa.string())
    for part in corpus_parts(store, corpus_version):
        table = store.get_columns(part, ["key", "title", "sources"])
        sources = table["sources"].combine_chunks()
        rows = pc.list_parent_indices(sources).filter(pc.is_in(pc.list_flatten(sources), value_set=wanted))
        places = pa.array(range(table.num_rows), rows.type)
        chosen = table.filter(pc.or_(pc.is_in(places, value_set=rows), pc.is_in(table["key"], value_set=wanted)))
        found += [Known(row["key"], row["title"], tuple(row["sources"])) for row in chosen.to_pylist()]
    known = {name for passage in found for name in (passage.key, *passage.sources)}
    unknown = sorted(name for name in {*names} - known if not is_key(name))
    if unknown:
        raise InputError(
            f"store = {store.url!r}: the corpus {corpus_version} has no passage {', '.join(unknown[:5])}",
            "give a passage's key, or the id under which the corpus has it",
        )
    return sorted(found, key=lambda passage: passage.key)


def is_key(name: str) -> bool:
    """Whether a name has the form of a passage's key."""
    return _KEY.fullmatch(name) is not None


def corpus_parts(store: Store, version: str) -> list[str]:
    """Return the parts of a corpus version.

    Raises:
        StoreError: when it has no readable manifest.
    """
    name = f"corpus/{version}/manifest.json"
    try:
        document = json.loads(store.get_if_exists(name) or b"")
        if is_intact(document):
            return [str(part) for part in document["parts"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise StoreError(f"{store.url}/{name}: missing, altered, or names no parts", "run `prag repair`")


def holding(store: Store, snapshots: Iterable[Snapshot], keys: Sequence[str]) -> dict[str, list[str]]:
    """Return, by snapshot id, the corpus and ledger parts through which snapshots still hold bytes of these keys.

    Raises:
        StoreError: when one of these cannot be read.
    """
    seen: dict[str, bool] = {}
    found = {}
    for snapshot in snapshots:
        parts = [*corpus_parts(store, snapshot.corpus_version), *snapshot.ledger_parts]
        for part in parts:
            if part not in seen:
                seen[part] = _has_any(store, part, keys)
        if held := [part for part in parts if seen[part]]:
            found[snapshot.id] = held
    return found


def snapshots_to_keep(store: Store, newest: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return the ids of the snapshots that a collection keeps, and through which parts they hold forgotten passages.

    Kept are the `newest` so many, the pinned ones and the one in service (`kept_snapshots`), but for age alone none
    that holds a forgotten passage.

    Raises:
        StoreError: when a snapshot, or a part that one names, cannot be read.
    """
    kept = kept_snapshots(store, newest)
    serving = current_id(store)
    forgotten = load_snapshot(store, serving).tombstones if serving else ()
    if not forgotten:
        return kept, {}
    held = holding(store, [load_snapshot(store, id) for id in kept], forgotten)
    kept = [id for id in kept if id not in held or id in (serving, *pinned(store))]
    return kept, {id: parts for id, parts in held.items() if id in kept}


def erase_rows(store: Store, keys: Collection[str], check: Callable[[], None] = lambda: None) -> list[str]:
    """Take passages out of the augmentations and rejects, and return the parts that were removed for it.

    `check` is called before each removal, and raises when the store's lease is lost.

    Raises:
        StoreError: when the store cannot be read or written; what was erased until then stays so.
    """
    wanted = pa.array(sorted(keys), pa.string())
    removed = []
    for part in [name for folder in _TABLES for name in store.list(folder, ".parquet")]:
        if not _has_any(store, part, wanted):
            continue
        table = store.get_part(part)  # what is written anew has been checked: nothing altered gets a good name
        rest = table.filter(pc.invert(pc.is_in(table["key"], value_set=wanted)))
        if rest.num_rows:
            store.put_table(posixpath.dirname(part), rest)
        check()
        remove(store, part)
        removed.append(part)
    return removed


def _has_any(store: Store, part: str, keys: Sequence[str] | pa.Array) -> bool:
    wanted = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string())
    return bool(pc.any(pc.is_in(store.get_columns(part, ["key"])["key"], value_set=wanted)).as_py())
