"""Differences between two stored versions of a corpus, by content key and by source id."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.tables import group_by_columns, map_blocks
from pipelines.stages.ingest import stored_passages
from prag_core.store.objects import Store

# A source id of a passage in the old version, the new one or both. `kept` says that both versions have the passage.
_PLACE = pa.schema(
    [*(pa.field(n, pa.string()) for n in ("key", "source")), *(pa.field(n, pa.bool_()) for n in ("new", "kept"))]
)
_COUNT = pa.schema([pa.field("name", pa.string()), pa.field("count", pa.int64())])


@dataclass(frozen=True)
class CorpusDiff:
    """Counts of what differs between an old and a new version of a corpus.

    By passage: `passages_new`, `passages_gone` and `passages_kept`. By source id: ids that were `added` or `removed`,
    ids whose text `changed`, and ids that `moved`: new ids of a passage that the old version has under another id.
    """

    passages_new: int = 0
    passages_gone: int = 0
    passages_kept: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    moved: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in asdict(self).items())


def compare_corpora(store: Store, old: str | None, new: str, partitions: int) -> CorpusDiff:
    """Compare two stored corpus versions with two shuffles, and return the counts.

    With `old` None every passage is new. The second shuffle moves only the ids that differ.
    """
    versions = [(new, True)] if old is None else [(old, False), (new, True)]
    facts = [
        map_blocks(stored_passages(store, version, partitions, ["key", "sources"]), _facts, new=is_new)
        for version, is_new in versions
    ]
    by_key = group_by_columns(facts[0].union(*facts[1:]), ["key"], partitions)
    places = map_blocks(by_key, _differing).materialize()
    by_source = group_by_columns(map_blocks(places, _with_source), ["source"], partitions)
    counts: Counter[str] = Counter()
    for counted in (map_blocks(places, _count_keys), map_blocks(by_source, _count_sources)):
        for row in counted.iter_rows():
            counts[row["name"]] += row["count"]
    return CorpusDiff(**counts)


def _facts(table: pa.Table, new: bool) -> pa.Table:
    keys = table["key"].take(pc.list_parent_indices(table["sources"]))
    return pa.table({"key": keys, "source": pc.list_flatten(table["sources"]), "new": pa.repeat(new, len(keys))})


def _differing(table: pa.Table) -> pa.Table:
    """Return the ids that only one version has, and for each key one row without an id, so that keys are counted."""
    sides: dict[str, tuple[set[str], set[str]]] = {}
    for row in table.to_pylist():
        sides.setdefault(row["key"], (set(), set()))[row["new"]].add(row["source"])
    rows = []
    for key, (old, new) in sides.items():
        kept = bool(old) and bool(new)
        rows.append({"key": key, "source": None, "new": bool(new), "kept": kept})
        rows += [{"key": key, "source": source, "new": source in new, "kept": kept} for source in sorted(old ^ new)]
    return pa.Table.from_pylist(rows, schema=_PLACE)


def _count_keys(table: pa.Table) -> pa.Table:
    counts: Counter[str] = Counter()
    for row in table.to_pylist():
        if row["source"] is None:
            counts["passages_kept" if row["kept"] else "passages_new" if row["new"] else "passages_gone"] += 1
    return _count_table(counts)


def _with_source(table: pa.Table) -> pa.Table:
    return table.filter(table["source"].is_valid())


def _count_sources(table: pa.Table) -> pa.Table:
    """Count the ids by what happened to them; an id has at most one passage in each version."""
    places: dict[str, dict[bool, bool]] = {}
    for row in table.to_pylist():
        places.setdefault(row["source"], {})[row["new"]] = row["kept"]
    counts: Counter[str] = Counter()
    for sides in places.values():
        if len(sides) == 2:
            counts["changed"] += 1
        elif True in sides:
            counts["moved" if sides[True] else "added"] += 1
        elif not sides[False]:
            counts["removed"] += 1
    return _count_table(counts)


def _count_table(counts: Counter[str]) -> pa.Table:
    return pa.Table.from_pylist([{"name": name, "count": n} for name, n in counts.items()], schema=_COUNT)
