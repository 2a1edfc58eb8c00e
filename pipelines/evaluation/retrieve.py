"""Searches a snapshot's index with the questions of an evaluation, and finds which keys have an adapter.

Workers import this module to run its functions. It must not import torch, which would take each of them seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines.execution.lookup import iter_records
from pipelines.execution.tables import iter_blocks, map_blocks, read_columns
from prag_core.config import Config
from prag_core.data.questions import Question
from prag_core.llm.checkpoint import cache_dir
from prag_core.records import Hit, to_table
from prag_core.retrieval.archive import open_index
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot

_QUESTIONS_A_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The passages that a question retrieved, and the time of the search; `position` is the question's."""

    position: int
    hits: tuple[Hit, ...]
    retrieve_ms: float


def trained_keys(
    store: Store, snapshot: Snapshot, asked: Iterable[str], size: int, partitions: int
) -> tuple[frozenset[str], list[str]]:
    """Return those keys of `asked` that have an adapter, and `size` random keys that have one.

    Keys are hashes, so the smallest ones are a random sample. It does not depend on how the adapters are stored.
    """
    if not snapshot.ledger_parts:
        return frozenset(), []
    wanted, gone = sorted(set(asked)), set(snapshot.tombstones)
    rows = read_columns(store, snapshot.ledger_parts, ["key"], partitions)
    kept = map_blocks(rows, _wanted_or_small, wanted=wanted, size=size)
    keys = sorted({key for block in iter_blocks(kept) for key in block["key"].to_pylist()} - gone)
    return frozenset(wanted) & frozenset(keys), keys[:size]


def retrieve(
    config: Config, store: Store, snapshot: Snapshot, questions: Sequence[Question], depth: int, most: int
) -> list[Retrieved]:
    """Return the passages that each question retrieves, without those with a tombstone, in the questions' order.

    Each retrieves `depth` passages; at most `most` actors search.
    """
    rows = [{"position": i, "question": question.question} for i, question in enumerate(questions)]
    found = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _QUESTIONS_A_BLOCK)).map_batches(
        SearchIndex,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(config, store, snapshot, depth),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,
        runtime_env={"env_vars": index_kind(config.index).PROCESS_ENV},
    )
    return sorted(iter_records(Retrieved, found), key=lambda row: row.position)


class SearchIndex:
    """The actor that searches. Its process holds the index, so the driver needs none of what the index requires."""

    def __init__(self, config: Config, store: Store, snapshot: Snapshot, depth: int) -> None:
        self._index = open_index(store, snapshot.index, cache_dir() / "indexes", config.index)
        self._gone = frozenset(snapshot.tombstones)
        self._depth = depth + len(self._gone)
        self._index.search("warm up", 1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Search with a block of questions, one after the other."""
        found = []
        for row in table.to_pylist():
            begun = time.perf_counter()
            hits = self._index.search(row["question"], self._depth)
            search_ms = (time.perf_counter() - begun) * 1e3
            found.append(
                Retrieved(row["position"], tuple(h for h in hits if h.passage.key not in self._gone), search_ms)
            )
        return to_table(Retrieved, found)


def _wanted_or_small(table: pa.Table, wanted: list[str], size: int) -> pa.Table:
    named = table.filter(pc.is_in(table["key"], value_set=pa.array(wanted, pa.string())))
    return pa.concat_tables([named, table.sort_by("key").slice(0, size)])
