"""Looking up passages, gold passages and augmentations of a snapshot, each by one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines.execution.tables import read_columns, read_parts
from prag_core.data.gold import GoldIndex
from prag_core.data.questions import Question
from prag_core.records import Augmentation, Passage, from_table, schema, to_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot
from prag_core.store.tables import corpus_parts


def find_gold(store: Store, snapshot: Snapshot, questions: Sequence[Question], partitions: int) -> list[Passage]:
    """Return the passages of the snapshot's corpus that are gold for some question."""
    return _passages(store, snapshot, GoldIndex(questions).is_gold, partitions)


def find_passages(store: Store, snapshot: Snapshot, keys: Iterable[str], partitions: int) -> list[Passage]:
    """Return the passages of these keys."""
    wanted = frozenset(keys)
    return _passages(store, snapshot, lambda passage: passage.key in wanted, partitions) if wanted else []


def _passages(store: Store, snapshot: Snapshot, chosen: Callable[[Passage], bool], partitions: int) -> list[Passage]:
    parts = corpus_parts(store, snapshot.corpus_version)
    rows = read_columns(store, parts, schema(Passage).names, partitions)
    kept = rows.map_batches(_choose, batch_format="pyarrow", fn_kwargs={"chosen": chosen})
    gone = set(snapshot.tombstones)
    return sorted((p for p in iter_records(Passage, kept) if p.key not in gone), key=lambda p: p.key)


def find_augmentations(
    store: Store, augment_fingerprint: str, keys: Iterable[str], partitions: int
) -> dict[str, Augmentation]:
    """Return the augmentations of these keys; of several of one key, that with the smallest digest, as in training."""
    wanted = sorted(set(keys))
    rows = None
    if wanted:
        rows = read_parts(store, f"augmentations/{augment_fingerprint}", schema(Augmentation).names, partitions)
    if rows is None:
        return {}
    kept = rows.map_batches(_of_keys, batch_format="pyarrow", fn_kwargs={"wanted": wanted})
    found: dict[str, Augmentation] = {}
    for augmentation in iter_records(Augmentation, kept):
        key = augmentation.key
        if key not in found or augmentation.digest < found[key].digest:
            found[key] = augmentation
    return found


def _choose(table: pa.Table, chosen: Callable[[Passage], bool]) -> pa.Table:
    if not table.num_columns:
        return schema(Passage).empty_table()
    return to_table(Passage, [passage for passage in from_table(Passage, table) if chosen(passage)])


def _of_keys(table: pa.Table, wanted: list[str]) -> pa.Table:
    if not table.num_columns:
        return schema(Augmentation).empty_table()
    return table.filter(pc.is_in(table["key"], value_set=pa.array(wanted, pa.string())))


def iter_records(record: Any, rows: ray.data.Dataset) -> Iterator[Any]:
    """Yield the rows of a dataset as records."""
    for batch in batches(rows):
        yield from from_table(record, batch)


def batches(rows: ray.data.Dataset) -> Iterator[pa.Table]:
    """Yield the blocks of a dataset that have rows."""
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        if batch.num_columns:
            yield batch
