"""Between the store and Ray Data: reading stored tables, and what is not done yet.

Workers import this file to run its functions, so nothing here may import torch: it would cost each of them seconds.
"""

from __future__ import annotations

import os
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pyarrow.fs import FSSpecHandler, PyFileSystem

from prag_core.records import Augmentation, Reject, from_table, schema, to_table
from prag_core.store import Store

# Reasons that are not the passage's fault: a server that was down, a file of imports that lacked it.
TRANSIENT = ("generation_failed", "not_imported")


def read_table(store: Store, folder: str, record: type, columns: list[str] | None = None) -> ray.data.Dataset | None:
    """Read the Parquet parts under a folder of the store; None when there are none.

    Ray Data forgets the columns of a dataset without rows, so that one could not be joined.
    """
    wanted = schema(record)  # type: ignore[arg-type]
    if columns is not None:
        wanted = pa.schema([wanted.field(name) for name in columns])
    parts = store.list(folder, ".parquet")
    if not parts:
        return None
    return ray.data.read_parquet(
        [store.path(part) for part in parts],
        filesystem=PyFileSystem(FSSpecHandler(store.fs)),
        columns=wanted.names,
    )


def augmented(
    store: Store, passages: ray.data.Dataset, augment_fingerprint: str, partitions: int
) -> ray.data.Dataset | None:
    """Return each passage that has an augmentation, with it and its digest (column `augmentation`); None at first."""
    rows = read_table(store, f"augmentations/{augment_fingerprint}", Augmentation)
    if rows is None:
        return None
    made = rows.repartition(partitions, keys=["key"]).map_batches(_one_each, batch_size=None, batch_format="pyarrow")
    return passages.join(made, join_type="inner", on=("key",), num_partitions=partitions)


def _one_each(table: pa.Table) -> pa.Table:
    """Keep one augmentation a key and add its digest: a retried task may have stored a passage's twice."""
    rows = from_table(Augmentation, table) if table.num_rows else []
    chosen: dict[str, Augmentation] = {}
    for row in sorted(rows, key=lambda row: (row.key, row.digest)):
        chosen.setdefault(row.key, row)
    kept = to_table(Augmentation, chosen.values()).select(["key", "rewrites", "pairs", "origin"])
    return kept.append_column("augmentation", pa.array([row.digest for row in chosen.values()], pa.string()))


def without(
    left: ray.data.Dataset, done: ray.data.Dataset | None, on: tuple[str, ...], partitions: int
) -> ray.data.Dataset:
    """Return the rows of `left` whose key is not among the `done`: what is missing is a join."""
    if done is None:
        return left
    return left.join(done, join_type="left_anti", on=on, num_partitions=partitions)


def rejected_keys(store: Store, stage: str, recipe: str) -> ray.data.Dataset | None:
    """Return the keys (and nothing else) that a stage gave up on for a recipe, in this run or an earlier one.

    Rejects for a `TRANSIENT` reason are not among them: the next run tries again.
    """
    rows = read_table(store, f"rejects/{stage}", Reject, ["key", "recipe", "reason"])
    if rows is None:
        return None
    return rows.map_batches(_of_recipe, batch_format="pyarrow", fn_kwargs={"recipe": recipe})


def _of_recipe(table: pa.Table, recipe: str) -> pa.Table:
    final = pc.invert(pc.is_in(table["reason"], value_set=pa.array(TRANSIENT)))
    return table.filter(pc.and_(pc.equal(table["recipe"], recipe), final)).select(["key"])


def count_by_reason(store: Store, stage: str, recipe: str, of: ray.data.Dataset, partitions: int) -> Counter[str]:
    """Count, by reason, the passages among `of` that a stage gave up on for a recipe in earlier runs."""
    rows = read_table(store, f"rejects/{stage}", Reject, ["key", "recipe", "reason"])
    if rows is None:
        return Counter()
    among = rows.join(of.select_columns(["key"]), join_type="inner", on=("key",), num_partitions=partitions)
    final = [row for row in among.iter_rows() if row["recipe"] == recipe and row["reason"] not in TRANSIENT]
    reasons = {row["key"]: row["reason"] for row in final}
    return Counter(reasons.values())


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads in this actor; None means all cores (Ray gives each actor one by default)."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
