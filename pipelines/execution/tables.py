"""Stored tables in Ray Data: reading them, mapping them block by block, bringing rows together.

Workers import this file to run its functions, so nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Profile
from prag_core.store.objects import Store

# Stored parts that one task reads: enough that starting the task does not count, at worst some million ledger rows.
PARTS_PER_TASK = 64


def map_blocks(rows: ray.data.Dataset, fn: Callable[..., Any], /, **kwargs: Any) -> ray.data.Dataset:
    """Apply `fn(block, **kwargs)` to each block of `rows`, a pyarrow table.

    The table has at least one row: Ray Data passes empty blocks on without calling the function.
    """
    return rows.map_batches(fn, batch_size=None, batch_format="pyarrow", fn_kwargs=kwargs)


def iter_blocks(rows: ray.data.Dataset) -> Iterator[pa.Table]:
    """Run a pipeline to its end and yield its blocks that have rows, as pyarrow tables, each as soon as it is there."""
    # With a block prefetched, each would come when the next one is there, which may be an hour later.
    blocks = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    return cast(Iterator[pa.Table], iter(blocks))


def fetch_table(rows: ray.data.Dataset) -> pa.Table:
    """Bring a dataset into this process; it must have at least one row, and few enough for one task."""
    return pa.concat_tables(iter_blocks(rows))


def keep_keys(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the rows whose `key` is among `keys`."""
    return table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.string())))


def drop_keys(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the rows whose `key` is not among `keys`."""
    return table.filter(pc.invert(pc.is_in(table["key"], value_set=pa.array(keys, pa.string()))))


def distinct(table: pa.Table, column: str) -> pa.Table:
    """Return the different values of a column."""
    return pa.table({column: table[column].unique()})


def group_by_columns(rows: ray.data.Dataset, columns: Sequence[str], blocks: int) -> ray.data.Dataset:
    """Put all rows with equal values in `columns` into the same one of `blocks` blocks.

    A shuffle runs in actors, and an actor takes seconds to start. One block is made by a task, without actors
    (`Profile.blocks`).
    """
    return rows.repartition(blocks, keys=list(columns)) if blocks > 1 else rows.repartition(1)


def join_small(rows: ray.data.Dataset, few: pa.Table, on: Sequence[str]) -> ray.data.Dataset:
    """Return the inner join of `rows` with a table that fits into one task, on the columns `on`."""
    return map_blocks(rows, _join, few=few, on=list(on))


def _join(table: pa.Table, few: pa.Table, on: list[str]) -> pa.Table:
    fields = [*table.schema, *(field for field in few.schema if field.name not in on)]
    left: Any = pl.from_arrow(table)
    right: Any = pl.from_arrow(few)
    joined = left.join(right, on=on, how="inner", maintain_order="left")
    return joined.select([field.name for field in fields]).to_arrow().cast(pa.schema(fields))


def spread(rows: Sequence[Mapping[str, str]], blocks: int) -> ray.data.Dataset:
    """Return rows, at least one, as a dataset of at most `blocks` blocks; each row names an object to read.

    `ray.data.read_parquet` starts a task for each small part, which costs more than reading the part.
    """
    return ray.data.from_items(list(rows), override_num_blocks=min(blocks, len(rows)))


def map_objects(names: Sequence[str], blocks: int, fn: Callable[[str], pa.Table]) -> ray.data.Dataset:
    """Return the tables that `fn` returns for the names of stored objects, read by at most `blocks` tasks."""
    return map_blocks(spread([{"name": name} for name in names], blocks), _call_each, fn=fn)


def _call_each(table: pa.Table, fn: Callable[[str], pa.Table]) -> Iterator[pa.Table]:
    for name in table["name"].to_pylist():
        yield fn(name)


def blocks_for_parts(parts: int, profile: Profile) -> int:
    """Return the number of blocks for the rows of `parts` stored parts: one if a task can hold them all."""
    return 1 if parts <= PARTS_PER_TASK else max(profile.partitions, -(-parts // PARTS_PER_TASK))


def read_parts(store: Store, folder: str, columns: list[str], partitions: int) -> ray.data.Dataset | None:
    """Read columns of the Parquet parts under a folder of the store; return None when there are none.

    A dataset without rows has no columns in Ray Data, so it could not be joined.
    """
    parts = store.list(folder, ".parquet")
    return read_columns(store, parts, columns, partitions) if parts else None


def read_columns(store: Store, parts: Sequence[str], columns: list[str], partitions: int) -> ray.data.Dataset:
    """Read columns of Parquet parts of the store; there must be at least one part."""
    return map_objects(parts, partitions, partial(store.get_columns, columns=columns))
