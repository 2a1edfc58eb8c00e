"""A batch as the train stage's actors get it."""

from __future__ import annotations

import pyarrow as pa

from pipelines.execution.outcomes import TASK
from prag_core.records import Augmentation, Passage, to_table
from tests.helpers.passages import make_augmentation


def training_batch(passages: list[Passage]) -> pa.Table:
    augmentations = [make_augmentation(passage) for passage in passages]
    texts = to_table(Augmentation, augmentations).select(["rewrites", "pairs", "origin"])
    table = to_table(Passage, passages)
    for name in texts.column_names:
        table = table.append_column(name, texts[name])
    table = table.append_column("augmentation", pa.array([a.digest for a in augmentations]))
    return table.append_column(TASK, pa.array([f"task of {len(passages)}"] * len(passages)))
