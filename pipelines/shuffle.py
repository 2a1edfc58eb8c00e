"""Bringing rows together in Ray Data.

A shuffle by key is done by actors, each a process that takes seconds to start. What one task can hold needs none
(`Profile.blocks`): that is a corpus of some thousand passages, and what a night changed of any corpus.

Workers import this file to run its functions, so nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import ray.data


def together(rows: ray.data.Dataset, keys: Sequence[str], blocks: int) -> ray.data.Dataset:
    """Bring all rows with the same values in the columns `keys` into one of so many blocks."""
    return rows.repartition(blocks, keys=list(keys)) if blocks > 1 else rows.repartition(1)


def fetched(rows: ray.data.Dataset) -> pa.Table:
    """Bring a dataset, with one row at least and few enough for one task, into this process."""
    blocks = [block for block in rows.iter_batches(batch_size=None, batch_format="pyarrow") if block.num_columns]
    return pa.concat_tables(blocks)


def join_few(rows: ray.data.Dataset, few: pa.Table, on: Sequence[str]) -> ray.data.Dataset:
    """Return those of `rows` that `few` has too (equal in the columns `on`), with its other columns beside theirs."""
    return rows.map_batches(_joined, batch_size=None, batch_format="pyarrow", fn_kwargs={"few": few, "on": list(on)})


def _joined(table: pa.Table, few: pa.Table, on: list[str]) -> pa.Table:
    fields = [*table.schema, *(field for field in few.schema if field.name not in on)]
    left: Any = pl.from_arrow(table)
    right: Any = pl.from_arrow(few)
    made = left.join(right, on=on, how="inner", maintain_order="left")
    return made.select([field.name for field in fields]).to_arrow().cast(pa.schema(fields))
