"""The train stage's batches, and its adapters as they are without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.execution.child_process import Heartbeat
from pipelines.execution.outcomes import TASK
from pipelines.settings import make_context
from pipelines.stages.train import TrainAdapters
from prag_core.config import Config
from prag_core.records import Augmentation, Passage, to_table
from prag_core.store.adapters import AdapterStore, LedgerSource, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot
from tests.helpers.passages import make_augmentation


def training_batch(passages: list[Passage]) -> pa.Table:
    augmentations = [make_augmentation(passage) for passage in passages]
    texts = to_table(Augmentation, augmentations).select(["rewrites", "pairs", "origin"])
    table = to_table(Passage, passages)
    for name in texts.column_names:
        table = table.append_column(name, texts[name])
    table = table.append_column("augmentation", pa.array([a.digest for a in augmentations]))
    return table.append_column(TASK, pa.array([f"task of {len(passages)}"] * len(passages)))


def outcomes_here(actor: Any, table: pa.Table, heartbeat: Heartbeat = lambda share: None) -> Iterator[pa.Table]:
    """Pass a batch through an actor in this process, one step after the other, and yield its outcomes."""
    for done in actor(actor.prepare(table), heartbeat):
        yield done if isinstance(done, pa.Table) else done()


def train_here(config: Config, passages: list[Passage]) -> LedgerSource:
    """Train passages with the train stage's actor in this process; return the adapters.

    Their augmentations are imported ones without rewrites, as in the runs of a workspace.
    """
    context = make_context(config, "run")
    table = training_batch(passages)
    nothing = pa.array([[]] * len(passages), pa.list_(pa.string()))
    table = table.set_column(table.column_names.index("rewrites"), "rewrites", nothing)
    assert sum(done.num_rows for done in outcomes_here(TrainAdapters(context), table)) == len(passages)
    adapters = AdapterStore(context.store, context.recipe, context.layout)
    return LedgerSource(adapters, adapters.ledger_parts())


def assert_same_adapters(store: Store, expected: LedgerSource, passages: list[Passage]) -> None:
    """See that the snapshot in service of a store has the expected adapters of these passages."""
    snapshot = load_snapshot(store)
    source = LedgerSource(open_adapters(store, snapshot.recipe)[0], snapshot.ledger_parts)
    for passage in passages:
        left, right = source.get(passage.key), expected.get(passage.key)
        for name in left:
            assert (left[name] - right[name]).abs().max() < 1e-5, (passage.sources, name)
