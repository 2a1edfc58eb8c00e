"""Records as Parquet parts of the store: augmentations, rejects and passages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from prag_core.errors import InputError, StoreError
from prag_core.identity import KEY_BYTES, is_intact
from prag_core.records import Augmentation, Reject, to_table
from prag_core.store.objects import Store

_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class KnownPassage:
    """A passage of a corpus version, without its text."""

    key: str
    title: str
    sources: tuple[str, ...]


def find_passages(store: Store, corpus_version: str, names: Sequence[str]) -> list[KnownPassage]:
    """Return the passages of a corpus version that `names` give, by key or by the id under which a source has them.

    Raises:
        InputError: when a name is the id of none. A key of none is none of the corpus any more, and left out.
        StoreError: when the corpus cannot be read.
    """
    found: list[KnownPassage] = []
    wanted = pa.array(sorted(set(names)), pa.string())
    for part in corpus_parts(store, corpus_version):
        table = store.get_columns(part, ["key", "title", "sources"])
        sources = table["sources"].combine_chunks()
        rows = pc.list_parent_indices(sources).filter(pc.is_in(pc.list_flatten(sources), value_set=wanted))
        places = pa.array(range(table.num_rows), rows.type)
        chosen = table.filter(pc.or_(pc.is_in(places, value_set=rows), pc.is_in(table["key"], value_set=wanted)))
        found += [KnownPassage(row["key"], row["title"], tuple(row["sources"])) for row in chosen.to_pylist()]
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


def put_augmentations(store: Store, recipe: str, rows: Iterable[Augmentation]) -> str:
    """Store augmentations of one augment recipe as they are made, each with its digest in a column of its own.

    Who asks what is done reads the digests alone, not the texts.
    """
    rows = list(rows)
    digests = pa.array([row.digest for row in rows], pa.string())
    table = to_table(Augmentation, rows).append_column("digest", digests)
    return store.put_table(f"augmentations/{recipe}", table)


def put_rejects(store: Store, run: str, rows: Sequence[Reject]) -> None:
    """Store rejects, by the stage that gave them up."""
    for stage in sorted({row.stage for row in rows}):
        store.put_table(f"rejects/{stage}/{run}", to_table(Reject, [row for row in rows if row.stage == stage]))
