"""Augmentations, rejects and passages as Parquet parts of the store."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.data.files import shown
from prag_core.data.parsing import is_storable
from prag_core.errors import InputError
from prag_core.identity import is_checksum
from prag_core.records import Augmentation, Reject, from_table, to_table
from prag_core.store.objects import Store


@dataclass(frozen=True)
class PassageRef:
    """A passage of a corpus version: its key, its title, and the ids under which the corpus has it."""

    key: str
    title: str
    sources: tuple[str, ...]


def find_passages(store: Store, corpus_version: str, names: Sequence[str]) -> list[PassageRef]:
    """Return the passages of a corpus version with these names, which are keys or source ids.

    A key that the corpus does not have is left out: it may belong to an earlier corpus version.

    Raises:
        InputError: if no passage has a source id.
        StoreError: if the corpus cannot be read.
    """
    found: list[PassageRef] = []
    # A name that cannot be stored, such as an argument that is not UTF-8, names nothing.
    wanted = pa.array(sorted({name for name in names if is_storable(name)}), pa.string())
    for part in corpus_parts(store, corpus_version):
        table = store.get_columns(part, ["key", "title", "sources"])
        sources = table["sources"].combine_chunks()
        rows = pc.list_parent_indices(sources).filter(pc.is_in(pc.list_flatten(sources), value_set=wanted))
        row_numbers = pa.array(range(table.num_rows), rows.type)
        chosen = table.filter(pc.or_(pc.is_in(row_numbers, value_set=rows), pc.is_in(table["key"], value_set=wanted)))
        found += [PassageRef(row["key"], row["title"], tuple(row["sources"])) for row in chosen.to_pylist()]
    known = {name for passage in found for name in (passage.key, *passage.sources)}
    unknown = sorted(name for name in {*names} - known if not is_checksum(name))
    if unknown:
        raise InputError(
            f"store = {store.url!r}: the corpus {corpus_version} has no passage {', '.join(map(shown, unknown[:5]))}",
            "give a passage's key, or the id under which the corpus has it; a long record's parts are ID#0, ID#1, …",
        )
    return sorted(found, key=lambda passage: passage.key)


def corpus_parts(store: Store, version: str) -> list[str]:
    """Return the names of the Parquet parts of a corpus version.

    Raises:
        DamagedError: if it has no readable manifest.
    """
    return [str(part) for part in store.get_sealed(f"corpus/{version}/manifest.json", "parts")["parts"]]


def put_augmentations(store: Store, recipe: str, rows: Iterable[Augmentation]) -> str:
    """Store augmentations of one augment recipe, and return the part's name.

    Each row has its digest in a column of its own, so that a survey of what is done need not read the texts.
    """
    rows = list(rows)
    digests = pa.array([row.digest for row in rows], pa.string())
    table = to_table(Augmentation, rows).append_column("digest", digests)
    return store.put_table(f"augmentations/{recipe}", table)


def put_rejects(store: Store, run: str, rows: Sequence[Reject]) -> None:
    """Store rejects, in a part for each stage."""
    for stage in sorted({row.stage for row in rows}):
        store.put_table(f"rejects/{stage}/{run}", to_table(Reject, [row for row in rows if row.stage == stage]))


def clear_rejects(store: Store, stage: str | None, reason: str | None) -> int:
    """Remove the rejects of a stage and a reason (None: of all), so that the next run tries their inputs again.

    Returns:
        The number of different inputs whose rejects were removed.

    Raises:
        StoreError: if a part of the rejects cannot be read.
    """
    cleared: set[tuple[str, str, str]] = set()
    for part in store.list(f"rejects/{stage}" if stage else "rejects", ".parquet"):
        table = store.get_table(Reject, [part])
        matches = pc.equal(table["reason"], reason) if reason else pc.is_valid(table["reason"])
        chosen = table.filter(matches)
        if not chosen.num_rows:
            continue
        cleared |= {(row.stage, row.key or row.source, row.recipe) for row in from_table(Reject, chosen)}
        rest = table.filter(pc.invert(matches))
        if rest.num_rows:
            store.put_table(posixpath.dirname(part), rest)
        store.remove(part)
    return len(cleared)
