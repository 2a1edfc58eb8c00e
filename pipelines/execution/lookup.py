"""Find passages, gold passages and augmentations of a snapshot, each by reading the stored parts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa
import ray.data

from pipelines.execution.tables import iter_blocks, keep_keys, map_blocks, read_columns, read_parts
from prag_core.data.gold import GoldIndex
from prag_core.data.questions import Question
from prag_core.records import Augmentation, Passage, from_table, schema, to_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot
from prag_core.store.tables import corpus_parts

T = TypeVar("T")


def find_gold(store: Store, snapshot: Snapshot, questions: Sequence[Question], partitions: int) -> list[Passage]:
    """Return the passages of the snapshot's corpus that are gold for at least one question."""
    return _passages(store, snapshot, GoldIndex(questions).is_gold, partitions)


def find_passages(store: Store, snapshot: Snapshot, keys: Iterable[str], partitions: int) -> list[Passage]:
    """Return the passages of the snapshot's corpus with these keys."""
    wanted = frozenset(keys)
    return _passages(store, snapshot, lambda passage: passage.key in wanted, partitions) if wanted else []


def _passages(store: Store, snapshot: Snapshot, is_wanted: Callable[[Passage], bool], partitions: int) -> list[Passage]:
    parts = corpus_parts(store, snapshot.corpus_version)
    rows = map_blocks(read_columns(store, parts, schema(Passage).names, partitions), _filter, is_wanted=is_wanted)
    tombstones = set(snapshot.tombstones)
    return sorted((p for p in iter_records(Passage, rows) if p.key not in tombstones), key=lambda p: p.key)


def find_augmentations(
    store: Store, augment_fingerprint: str, keys: Iterable[str], partitions: int
) -> dict[str, Augmentation]:
    """Return the augmentations of these keys; of several for one key, that with the smallest digest, as in training."""
    wanted = sorted(set(keys))
    rows = None
    if wanted:
        rows = read_parts(store, f"augmentations/{augment_fingerprint}", schema(Augmentation).names, partitions)
    if rows is None:
        return {}
    found: dict[str, Augmentation] = {}
    for augmentation in iter_records(Augmentation, map_blocks(rows, keep_keys, keys=wanted)):
        key = augmentation.key
        if key not in found or augmentation.digest < found[key].digest:
            found[key] = augmentation
    return found


def _filter(table: pa.Table, is_wanted: Callable[[Passage], bool]) -> pa.Table:
    return to_table(Passage, [passage for passage in from_table(Passage, table) if is_wanted(passage)])


def iter_records(record: type[T], rows: ray.data.Dataset) -> Iterator[T]:
    """Yield the rows of a dataset as records."""
    for block in iter_blocks(rows):
        yield from from_table(record, block)
