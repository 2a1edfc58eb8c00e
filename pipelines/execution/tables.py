"""Bringing rows together in Ray Data.

A shuffle by key is done by actors, each a process that takes seconds to start. What one task can hold needs none
(`Profile.blocks`): that is a corpus of some thousand passages, and what a night changed of any corpus.

Workers import this file to run its functions, so nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import ray.data

from cluster.resources import Profile
from prag_core.store.objects import Store

# Objects a task: enough that starting it does not count, few enough that they spread.
_OBJECTS_PER_TASK = 64


def group_by_columns(rows: ray.data.Dataset, keys: Sequence[str], blocks: int) -> ray.data.Dataset:
    """Bring all rows with the same values in the columns `keys` into one of so many blocks."""
    return rows.repartition(blocks, keys=list(keys)) if blocks > 1 else rows.repartition(1)


def fetch_table(rows: ray.data.Dataset) -> pa.Table:
    """Bring a dataset, with one row at least and few enough for one task, into this process."""
    blocks = [block for block in rows.iter_batches(batch_size=None, batch_format="pyarrow") if block.num_columns]
    return pa.concat_tables(blocks)


def join_small(rows: ray.data.Dataset, few: pa.Table, on: Sequence[str]) -> ray.data.Dataset:
    """Return those of `rows` that `few` has too (equal in the columns `on`), with its other columns beside theirs."""
    return rows.map_batches(_joined, batch_size=None, batch_format="pyarrow", fn_kwargs={"few": few, "on": list(on)})


def _joined(table: pa.Table, few: pa.Table, on: list[str]) -> pa.Table:
    fields = [*table.schema, *(field for field in few.schema if field.name not in on)]
    left: Any = pl.from_arrow(table)
    right: Any = pl.from_arrow(few)
    made = left.join(right, on=on, how="inner", maintain_order="left")
    return made.select([field.name for field in fields]).to_arrow().cast(pa.schema(fields))


def whole_blocks() -> dict[str, Any]:
    return {"batch_size": None, "batch_format": "pyarrow"}


def spread_names(names: Sequence[str], profile: Profile) -> ray.data.Dataset:
    return ray.data.from_items(
        [{"name": name} for name in names], override_num_blocks=partitions_for(len(names), profile)
    )


def partitions_for(objects: int, profile: Profile) -> int:
    """Return into how many tasks so many objects are cut: what one task does at once needs no second."""
    return 1 if objects <= _OBJECTS_PER_TASK else max(profile.partitions, -(-objects // _OBJECTS_PER_TASK))


def read_parts(store: Store, folder: str, columns: list[str], partitions: int) -> ray.data.Dataset | None:
    """Read columns of the Parquet parts under a folder of the store; None when there are none.

    Ray Data forgets the columns of a dataset without rows, so that one could not be joined.
    """
    parts = store.list(folder, ".parquet")
    return read_columns(store, parts, columns, partitions) if parts else None


def read_columns(store: Store, parts: Sequence[str], columns: list[str], partitions: int) -> ray.data.Dataset:
    """Read columns of Parquet parts of the store, of which there is one at least."""
    return spread([{"part": part} for part in parts], partitions).map_batches(
        _read, batch_size=None, batch_format="pyarrow", fn_kwargs={"store": store, "columns": columns}
    )


def spread(parts: list[dict[str, str]], partitions: int) -> ray.data.Dataset:
    # Many parts a task: ray.data.read_parquet gives each small part one of its own, which costs more than the part.
    return ray.data.from_items(parts, override_num_blocks=min(partitions, len(parts)))


def _read(table: pa.Table, store: Store, columns: list[str]) -> Iterator[pa.Table]:
    for part in table["part"].to_pylist():
        yield store.get_columns(part, columns)


def distinct(table: pa.Table, column: str) -> Iterator[pa.Table]:
    """Give back the different values of a column; a block without columns has none."""
    if table.num_columns:
        yield pa.table({column: table[column].unique()})
