"""What changed between two stored versions of a corpus, by content key and by source id."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipelines.execution.tables import group_by_columns
from pipelines.stages.ingest import stored_passages
from prag_core.store.objects import Store

# An id under which a passage is in the old version, the new one or both. `kept` says that the passage is in both.
_PLACE = pa.schema(
    [*(pa.field(n, pa.string()) for n in ("key", "source")), *(pa.field(n, pa.bool_()) for n in ("new", "kept"))]
)
_COUNT = pa.schema([pa.field("what", pa.string()), pa.field("count", pa.int64())])


@dataclass(frozen=True)
class CorpusDiff:
    """What a new version of a corpus has that the old one had not, and the other way round.

    By passage: `passages_new`, `passages_gone` and `passages_kept`. By source id: `added` and `removed` ids, those
    `changed` (another text than before), and those `moved`: new names of a passage that was there before.
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
    """Compare two stored corpus versions (`old` None: there was nothing) by two shuffles; only counts come back.

    The second shuffle has the ids of what differs alone.
    """
    versions = [(new, True)] if old is None else [(old, False), (new, True)]
    facts = [
        stored_passages(store, version, partitions, ["key", "sources"]).map_batches(
            _facts, batch_size=None, batch_format="pyarrow", fn_kwargs={"new": is_new}
        )
        for version, is_new in versions
    ]
    by_key = group_by_columns(facts[0].union(*facts[1:]), ["key"], partitions)
    places = by_key.map_batches(_differing, batch_size=None, batch_format="pyarrow").materialize()
    counts: Counter[str] = Counter()
    for stage in (
        places.map_batches(_count_keys, batch_size=None, batch_format="pyarrow"),
        group_by_columns(
            places.map_batches(_with_source, batch_size=None, batch_format="pyarrow"), ["source"], partitions
        ).map_batches(_count_sources, batch_size=None, batch_format="pyarrow"),
    ):
        for row in stage.iter_rows():
            counts[row["what"]] += row["count"]
    return CorpusDiff(**counts)


def _facts(table: pa.Table, new: bool) -> pa.Table:
    if not table.num_columns:
        return pa.table({"key": pa.array([], pa.string()), "source": pa.array([], pa.string())}).append_column(
            "new", pa.array([], pa.bool_())
        )
    rows = [(row["key"], source) for row in table.to_pylist() for source in row["sources"]]
    return pa.table(
        {
            "key": pa.array([key for key, _ in rows], pa.string()),
            "source": pa.array([source for _, source in rows], pa.string()),
            "new": pa.array([new] * len(rows), pa.bool_()),
        }
    )


def _differing(table: pa.Table) -> pa.Table:
    """Keep the ids that are in one version only, and one row without an id for each key, so that keys are counted."""
    sides: dict[str, tuple[set[str], set[str]]] = {}
    for row in table.to_pylist() if table.num_columns else []:
        sides.setdefault(row["key"], (set(), set()))[row["new"]].add(row["source"])
    rows = []
    for key, (old, new) in sides.items():
        kept = bool(old) and bool(new)
        rows.append({"key": key, "source": None, "new": bool(new), "kept": kept})
        rows += [{"key": key, "source": source, "new": source in new, "kept": kept} for source in sorted(old ^ new)]
    return pa.Table.from_pylist(rows, schema=_PLACE)


def _count_keys(table: pa.Table) -> pa.Table:
    counts: Counter[str] = Counter()
    for row in table.to_pylist() if table.num_columns else []:
        if row["source"] is None:
            counts["passages_kept" if row["kept"] else "passages_new" if row["new"] else "passages_gone"] += 1
    return _counts(counts)


def _with_source(table: pa.Table) -> pa.Table:
    return table.filter(table["source"].is_valid()) if table.num_columns else _PLACE.empty_table()


def _count_sources(table: pa.Table) -> pa.Table:
    """Tell what became of each id: it has at most one passage in each version."""
    places: dict[str, dict[bool, bool]] = {}
    for row in table.to_pylist() if table.num_columns else []:
        places.setdefault(row["source"], {})[row["new"]] = row["kept"]
    counts: Counter[str] = Counter()
    for sides in places.values():
        if len(sides) == 2:
            counts["changed"] += 1
        elif True in sides:
            counts["moved" if sides[True] else "added"] += 1
        elif not sides[False]:
            counts["removed"] += 1
    return _counts(counts)


def _counts(counts: Counter[str]) -> pa.Table:
    return pa.Table.from_pylist([{"what": what, "count": n} for what, n in counts.items()], schema=_COUNT)
