"""What an evaluation reads from a snapshot, each by one streaming pass: gold passages, keys, augmentations.

Workers import this file to run its functions, so nothing here may import torch: it would cost each of them seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines.tables import read_columns, read_parts
from prag_core.config import Config
from prag_core.datasets import GoldIndex, Question
from prag_core.forgetting import corpus_parts
from prag_core.index_store import open_index
from prag_core.models import cache_dir
from prag_core.records import Augmentation, Hit, Passage, from_table, schema, to_table
from prag_core.retrieval import JVM_ENV
from prag_core.snapshot import Snapshot
from prag_core.store import Store

_QUESTIONS_A_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Found:
    """The passages that a question retrieved, and how long the search took."""

    position: int
    hits: tuple[Hit, ...]
    retrieve_ms: float


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
    return sorted((p for p in _records(Passage, kept) if p.key not in gone), key=lambda p: p.key)


def trained_keys(
    store: Store, snapshot: Snapshot, asked: Iterable[str], size: int, partitions: int
) -> tuple[frozenset[str], list[str]]:
    """Return which of the keys have an adapter, and `size` random keys that have one.

    Keys are hashes, so the smallest ones are a random sample of the corpus, and the same one however it is stored.
    """
    if not snapshot.ledger_parts:
        return frozenset(), []
    wanted, gone = sorted(set(asked)), set(snapshot.tombstones)
    rows = read_columns(store, snapshot.ledger_parts, ["key"], partitions)
    kept = rows.map_batches(_wanted_or_small, batch_format="pyarrow", fn_kwargs={"wanted": wanted, "size": size})
    keys = sorted({key for batch in batches(kept) for key in batch["key"].to_pylist()} - gone)
    return frozenset(wanted) & frozenset(keys), keys[:size]


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
    for augmentation in _records(Augmentation, kept):
        key = augmentation.key
        if key not in found or augmentation.digest < found[key].digest:
            found[key] = augmentation
    return found


def retrieve(
    config: Config, store: Store, snapshot: Snapshot, questions: Sequence[Question], depth: int, most: int
) -> list[Found]:
    """Return what each question retrieves from the snapshot's index, in their order, by `most` actors at most.

    Passages that a tombstone forbids are left out.
    """
    rows = [{"position": i, "question": question.question} for i, question in enumerate(questions)]
    found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _QUESTIONS_A_BLOCK)).map_batches(
        SearchIndex,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(config, store, snapshot, depth),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,
        runtime_env={"env_vars": JVM_ENV},
    )
    return sorted(_records(Found, found), key=lambda row: row.position)


class SearchIndex:
    """The actor that searches: the JVM lives in a process of its own."""

    def __init__(self, config: Config, store: Store, snapshot: Snapshot, depth: int) -> None:
        self._index = open_index(store, snapshot.index, cache_dir() / "indexes", config.index)
        self._gone = frozenset(snapshot.tombstones)
        self._depth = depth + len(self._gone)
        self._index.search("warm up", 1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Search a block of questions, one at a time."""
        found = []
        for row in table.to_pylist():
            begun = time.perf_counter()
            hits = self._index.search(row["question"], self._depth)
            taken_ms = (time.perf_counter() - begun) * 1e3
            found.append(Found(row["position"], tuple(h for h in hits if h.passage.key not in self._gone), taken_ms))
        return to_table(Found, found)


def _choose(table: pa.Table, chosen: Callable[[Passage], bool]) -> pa.Table:
    if not table.num_columns:
        return schema(Passage).empty_table()
    return to_table(Passage, [passage for passage in from_table(Passage, table) if chosen(passage)])


def _wanted_or_small(table: pa.Table, wanted: list[str], size: int) -> pa.Table:
    if not table.num_columns:
        return pa.table({"key": pa.array([], pa.string())})
    named = table.filter(pc.is_in(table["key"], value_set=pa.array(wanted, pa.string())))
    return pa.concat_tables([named, table.sort_by("key").slice(0, size)])


def _of_keys(table: pa.Table, wanted: list[str]) -> pa.Table:
    if not table.num_columns:
        return schema(Augmentation).empty_table()
    return table.filter(pc.is_in(table["key"], value_set=pa.array(wanted, pa.string())))


def _records(record: Any, rows: ray.data.Dataset) -> Iterator[Any]:
    for batch in batches(rows):
        yield from from_table(record, batch)


def batches(rows: ray.data.Dataset) -> Iterator[pa.Table]:
    """Yield the blocks of a dataset that have rows."""
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        if batch.num_columns:
            yield batch
