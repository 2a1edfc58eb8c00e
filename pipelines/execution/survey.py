"""Survey: which passages of a corpus are done, rejected or missing for a recipe.

Workers import this file to run its functions, so nothing here may import torch: it would cost each of them seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Profile
from pipelines.execution.tables import (
    PARTS_PER_TASK,
    fetch_table,
    group_by_columns,
    iter_blocks,
    join_small,
    keep_keys,
    map_blocks,
    read_parts,
    spread,
)
from prag_core.recipe import Recipe
from prag_core.records import Passage, from_table
from prag_core.store.ledger import visible_parts
from prag_core.store.objects import Store

# Reasons that are not the passage's fault: a server was down, the import file lacked the passage, a device was small.
TRANSIENT = ("generation_failed", "not_imported", "out_of_memory")

# A fact of the store about a key. `value` is the digest of its augmentation, the digest that its adapter was trained
# on, or the reason of a reject.
_FACT = pa.schema([pa.field(name, pa.string()) for name in ("key", "kind", "value")])
_STATE = pa.schema([pa.field(name, pa.string()) for name in ("key", "augmentation", "state", "reason")])
# The columns of a stored augmentation that training reads, besides its key and its digest.
_TEXTS = ("rewrites", "pairs", "origin")


@dataclass(frozen=True)
class Survey:
    """The state of each passage of a corpus for a recipe.

    `rows` has the columns `key`, `augmentation` (its digest, or null), `state` and `reason`. The states are
    `to_augment`, `augment_rejected`, `to_train`, `train_rejected` and `done`. `counts` is the number of passages by
    state; `reasons` splits the numbers of the two rejected states by reason.
    """

    rows: ray.data.Dataset
    counts: Counter[str]
    reasons: dict[str, Counter[str]]

    @property
    def passages(self) -> int:
        """The number of passages."""
        return sum(self.counts.values())

    @property
    def augmented(self) -> int:
        """The number of passages that have an augmentation."""
        return self.counts["to_train"] + self.counts["train_rejected"] + self.counts["done"]

    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejected passages by `stage/reason`."""
        states = {"augment": "augment_rejected", "train": "train_rejected"}
        return {f"{stage}/{reason}": n for stage, state in states.items() for reason, n in self.reasons[state].items()}

    def keys(self, state: str) -> ray.data.Dataset:
        """Return the keys in a state, each with the digest of its augmentation."""
        return map_blocks(self.rows, _in_state, state=state).select_columns(["key", "augmentation"])


def survey(store: Store, passages: ray.data.Dataset, count: int, recipe: Recipe, profile: Profile) -> Survey:
    """Find out the state of each of `count` passages with one shuffle; no key passes through the driver.

    If a passage has several augmentations (of a task that was retried), the one with the smallest digest counts.
    A reject does not count if its reason is in `TRANSIENT`, or if the passage was done after all.
    """
    augmented, trained = recipe.augment.fingerprint, recipe.fingerprint
    parts = [
        {"kind": kind, "column": column, "recipe": fingerprint, "part": part}
        for kind, column, fingerprint, names in (
            ("augmentation", "digest", "", store.list(f"augmentations/{augmented}", ".parquet")),
            ("adapter", "augmentation", "", visible_parts(store, trained)),
            ("augment_rejected", "reason", augmented, store.list("rejects/augment", ".parquet")),
            ("train_rejected", "reason", trained, store.list("rejects/train", ".parquet")),
        )
        for part in names
    ]
    facts = map_blocks(passages.select_columns(["key"]), _passage_facts)
    if parts:
        facts = facts.union(map_blocks(spread(parts, profile.partitions), _stored_facts, store=store))
    blocks = profile.blocks(count) if len(parts) <= PARTS_PER_TASK else profile.partitions
    rows = map_blocks(group_by_columns(facts, ["key"], blocks), _states).materialize()
    counts: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {"augment_rejected": Counter(), "train_rejected": Counter()}
    for row in map_blocks(rows, _count).iter_rows():
        counts[row["state"]] += row["count"]
        if row["reason"]:
            reasons[row["state"]][row["reason"]] += row["count"]
    return Survey(rows, counts, reasons)


def sample(found: Survey, passages: ray.data.Dataset, size: int) -> list[Passage]:
    """Return `size` of the passages that are to be augmented or trained (all, if there are fewer).

    They are those with the smallest keys: keys are hashes, so this is a random sample, and the same one each time.
    """
    smallest = map_blocks(found.rows, _smallest, size=size)
    keys = sorted(row["key"] for row in smallest.iter_rows())[:size]
    chosen = map_blocks(passages, keep_keys, keys=keys)
    rows = [passage for block in iter_blocks(chosen) for passage in from_table(Passage, block)]
    return sorted(rows, key=lambda passage: passage.key)


def with_passages(found: Survey, state: str, passages: ray.data.Dataset, profile: Profile) -> ray.data.Dataset:
    """Return the passages in a state, each with the digest of its augmentation."""
    keys = found.keys(state)
    blocks = profile.blocks(found.counts[state])
    if blocks == 1:
        return join_small(passages, fetch_table(keys), on=["key"])
    return passages.join(keys, join_type="inner", on=("key",), num_partitions=blocks)


def with_augmentations(
    store: Store, found: Survey, state: str, passages: ray.data.Dataset, augment_fingerprint: str, profile: Profile
) -> ray.data.Dataset:
    """Return the passages in a state, each with the digest and the texts of its augmentation."""
    wanted = with_passages(found, state, passages, profile)
    rows = read_parts(store, f"augmentations/{augment_fingerprint}", ["key", "digest", *_TEXTS], profile.partitions)
    if rows is None:  # the survey read the same parts, and found augmented passages in them
        raise RuntimeError(f"no augmentations under {augment_fingerprint}")
    rows = rows.rename_columns({"digest": "augmentation"})
    on: Any = ("key", "augmentation")  # Ray's own type allows only one column
    blocks = profile.blocks(found.counts[state])
    if blocks == 1:
        return map_blocks(group_by_columns(join_small(rows, fetch_table(wanted), on), on, 1), _unique)
    unique = map_blocks(group_by_columns(rows, on, blocks), _unique)
    return wanted.join(unique, join_type="inner", on=on, num_partitions=blocks)


def _passage_facts(table: pa.Table) -> pa.Table:
    return _as_facts(table["key"], "passage", pa.nulls(table.num_rows, pa.string()))


def _stored_facts(table: pa.Table, store: Store) -> Iterator[pa.Table]:
    for source in table.to_pylist():
        columns = ["key", source["column"]] + (["recipe"] if source["recipe"] else [])
        rows = store.get_columns(source["part"], columns)
        if source["recipe"]:
            final = pc.invert(pc.is_in(rows["reason"], value_set=pa.array(TRANSIENT)))
            rows = rows.filter(pc.and_(pc.equal(rows["recipe"], source["recipe"]), final))
        yield _as_facts(rows["key"], source["kind"], rows[source["column"]])


def _as_facts(keys: pa.ChunkedArray, kind: str, values: pa.ChunkedArray) -> pa.Table:
    return pa.table([keys, pa.repeat(pa.scalar(kind), len(keys)), values], names=_FACT.names).cast(_FACT)


def _states(table: pa.Table) -> pa.Table:
    """Turn all facts about some keys into one row a passage."""
    facts: Any = pl.from_arrow(table)

    def of_kind(kind: str) -> Any:
        return facts.filter(pl.col("kind") == kind).select("key", "value")

    def smallest(kind: str, name: str) -> Any:
        return of_kind(kind).group_by("key").agg(pl.col("value").min().alias(name))

    adapters = of_kind("adapter").unique().rename({"value": "augmentation"}).with_columns(adapter=pl.lit(True))
    rows = (
        of_kind("passage")
        .select("key")
        .unique()
        .join(smallest("augmentation", "augmentation"), on="key", how="left")
        .join(adapters, on=["key", "augmentation"], how="left")
        .join(smallest("augment_rejected", "augment_reason"), on="key", how="left")
        .join(smallest("train_rejected", "train_reason"), on="key", how="left")
    )
    augmented, trained = pl.col("augmentation").is_not_null(), pl.col("adapter").is_not_null()
    state = (
        pl.when(augmented & trained)
        .then(pl.lit("done"))
        .when(augmented & pl.col("train_reason").is_not_null())
        .then(pl.lit("train_rejected"))
        .when(augmented)
        .then(pl.lit("to_train"))
        .when(pl.col("augment_reason").is_not_null())
        .then(pl.lit("augment_rejected"))
        .otherwise(pl.lit("to_augment"))
    )
    reason = (
        pl.when(pl.col("state") == "train_rejected")
        .then(pl.col("train_reason"))
        .when(pl.col("state") == "augment_rejected")
        .then(pl.col("augment_reason"))
    )
    rows = rows.with_columns(state=state).with_columns(reason=reason).sort("key")
    return rows.select("key", "augmentation", "state", "reason").to_arrow().cast(_STATE)


def _smallest(table: pa.Table, size: int) -> pa.Table:
    missing = table.filter(pc.is_in(table["state"], value_set=pa.array(("to_augment", "to_train"))))
    return missing.select(["key"]).sort_by("key").slice(0, size)


def _in_state(table: pa.Table, state: str) -> pa.Table:
    return table.filter(pc.equal(table["state"], state))


def _count(table: pa.Table) -> pa.Table:
    counted = table.group_by(["state", "reason"]).aggregate([([], "count_all")])
    return counted.rename_columns(["state", "reason", "count"])


def _unique(table: pa.Table) -> pa.Table:
    """Keep one row of each augmentation: a task that was retried may have stored it twice."""
    numbered = table.select(["key", "augmentation"]).append_column("row", pa.array(range(table.num_rows)))
    return table.take(numbered.group_by(["key", "augmentation"]).aggregate([("row", "min")])["row_min"])
