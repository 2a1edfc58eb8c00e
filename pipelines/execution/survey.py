"""Between the store and Ray Data: reading stored tables, and what is not done yet.

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
from pipelines.execution.tables import fetch_table, group_by_columns, join_small, read_parts, spread
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, from_dict, schema
from prag_core.store.ledger import visible_parts
from prag_core.store.objects import Store

# Reasons that are not the passage's fault: a server that was down, a file of imports that lacked it, a small device.
TRANSIENT = ("generation_failed", "not_imported", "out_of_memory")

# Parts of which one task reads the facts: at worst some million rows of a compacted ledger.
PARTS_PER_TASK = 64

# What the store knows of a key: the digest of its augmentation, of the one an adapter was trained on, or a reason.
_FACT = pa.schema([pa.field(name, pa.string()) for name in ("key", "kind", "value")])
_STATE = pa.schema([pa.field(name, pa.string()) for name in ("key", "augmentation", "state", "reason")])
# What training reads of a stored augmentation: `augmentation` is its digest.
_TEXTS = ("rewrites", "pairs", "origin")
_AUGMENTATION = pa.schema(
    [*(pa.field(n, pa.string()) for n in ("key", "augmentation")), *(schema(Augmentation).field(n) for n in _TEXTS)]
)


@dataclass(frozen=True)
class Survey:
    """Where each passage of a corpus stands for a recipe.

    `rows` has the columns `key`, `augmentation` (its digest, or null), `state` and `reason`. The states are
    `to_augment`, `augment_rejected`, `to_train`, `train_rejected` and `done`; `counts` has the passages in each,
    `reasons` those of the two rejected states by reason.
    """

    rows: ray.data.Dataset
    counts: Counter[str]
    reasons: dict[str, Counter[str]]

    @property
    def passages(self) -> int:
        """All passages."""
        return sum(self.counts.values())

    @property
    def augmented(self) -> int:
        """The passages that have an augmentation."""
        return self.counts["to_train"] + self.counts["train_rejected"] + self.counts["done"]

    @property
    def rejected(self) -> dict[str, int]:
        """The rejected passages by `stage/reason`."""
        states = {"augment": "augment_rejected", "train": "train_rejected"}
        return {f"{stage}/{reason}": n for stage, state in states.items() for reason, n in self.reasons[state].items()}

    def keys(self, state: str) -> ray.data.Dataset:
        """Return the keys in a state, with their augmentation's digest."""
        chosen = self.rows.map_batches(_in_state, batch_format="pyarrow", fn_kwargs={"state": state})
        return chosen.select_columns(["key", "augmentation"])


def survey(store: Store, passages: ray.data.Dataset, count: int, recipe: Recipe, profile: Profile) -> Survey:
    """Find out by one shuffle what is done, given up and missing of `count` passages: no key passes the driver.

    Of several augmentations of a passage (a task that was tried again) the one with the smallest digest counts.
    A reject for a `TRANSIENT` reason, or of a passage that was done after all, is none.
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
    facts = passages.select_columns(["key"]).map_batches(_passage_facts, batch_size=None, batch_format="pyarrow")
    if parts:
        stored = spread(parts, profile.partitions).map_batches(
            _stored_facts, batch_size=None, batch_format="pyarrow", fn_kwargs={"store": store}
        )
        facts = facts.union(stored)
    joined = (
        group_by_columns(facts, ["key"], profile.blocks(count) if len(parts) <= PARTS_PER_TASK else profile.partitions)
        .map_batches(_states, batch_size=None, batch_format="pyarrow")
        .materialize()
    )
    counts: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {"augment_rejected": Counter(), "train_rejected": Counter()}
    for row in joined.map_batches(_count, batch_size=None, batch_format="pyarrow").iter_rows():
        counts[row["state"]] += row["count"]
        if row["reason"]:
            reasons[row["state"]][row["reason"]] += row["count"]
    return Survey(joined, counts, reasons)


def sample(found: Survey, passages: ray.data.Dataset, size: int) -> list[Passage]:
    """Return `size` of the passages for which something is to be done, or all of them: those of the smallest keys.

    Keys are hashes, so these are as good as drawn by lot, and they are the same ones each time.
    """
    smallest = found.rows.map_batches(_smallest, batch_size=None, batch_format="pyarrow", fn_kwargs={"size": size})
    keys = sorted(row["key"] for row in smallest.iter_rows())[:size]
    chosen = passages.map_batches(_of_keys, batch_size=None, batch_format="pyarrow", fn_kwargs={"keys": keys})
    return sorted((from_dict(Passage, row) for row in chosen.iter_rows()), key=lambda passage: passage.key)


def with_passages(found: Survey, state: str, passages: ray.data.Dataset, profile: Profile) -> ray.data.Dataset:
    """Return the passages that a survey found in a state, each with the digest of its augmentation."""
    keys = found.keys(state)
    blocks = profile.blocks(found.counts[state])
    if blocks == 1:
        return join_small(passages, fetch_table(keys), on=["key"])
    return passages.join(keys, join_type="inner", on=("key",), num_partitions=blocks)


def with_augmentations(
    store: Store, found: Survey, state: str, passages: ray.data.Dataset, augment_fingerprint: str, profile: Profile
) -> ray.data.Dataset:
    """Return the passages that a survey found in a state, each with its augmentation's digest and text."""
    wanted = with_passages(found, state, passages, profile)
    rows = read_parts(store, f"augmentations/{augment_fingerprint}", ["key", "digest", *_TEXTS], profile.partitions)
    if rows is None:  # a survey that found augmented passages read these very parts
        raise RuntimeError(f"no augmentations under {augment_fingerprint}")
    rows = rows.rename_columns({"digest": "augmentation"})
    on, whole = ("key", "augmentation"), {"batch_size": None, "batch_format": "pyarrow"}
    blocks = profile.blocks(found.counts[state])
    if blocks == 1:
        return group_by_columns(join_small(rows, fetch_table(wanted), on), on, 1).map_batches(_one_each, **whole)
    made = group_by_columns(rows, on, blocks).map_batches(_one_each, **whole)
    return wanted.join(made, join_type="inner", on=on, num_partitions=blocks)


def _passage_facts(table: pa.Table) -> pa.Table:
    keys = table["key"] if table.num_columns else pa.array([], pa.string())
    return _as_facts(keys, "passage", pa.nulls(len(keys), pa.string()))


def _stored_facts(table: pa.Table, store: Store) -> Iterator[pa.Table]:
    yield _FACT.empty_table()
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
    facts: Any = pl.from_arrow(table if table.num_columns else _FACT.empty_table())

    def of(kind: str) -> pl.DataFrame:
        return facts.filter(pl.col("kind") == kind).select("key", "value")

    def smallest(kind: str, name: str) -> pl.DataFrame:
        return of(kind).group_by("key").agg(pl.col("value").min().alias(name))

    adapters = of("adapter").unique().rename({"value": "augmentation"}).with_columns(adapter=pl.lit(True))
    rows = (
        of("passage")
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
    if not table.num_columns:
        return pa.table({"key": pa.array([], pa.string())})
    missing = table.filter(pc.is_in(table["state"], value_set=pa.array(("to_augment", "to_train"))))
    return missing.select(["key"]).sort_by("key").slice(0, size)


def _of_keys(table: pa.Table, keys: list[str]) -> pa.Table:
    if not table.num_columns:
        return schema(Passage).empty_table()
    return table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.string())))


def _in_state(table: pa.Table, state: str) -> pa.Table:
    return table.filter(pc.equal(table["state"], state))


def _count(table: pa.Table) -> pa.Table:
    counted = table.group_by(["state", "reason"]).aggregate([([], "count_all")])
    return counted.rename_columns(["state", "reason", "count"])


def _one_each(table: pa.Table) -> pa.Table:
    """Keep one row an augmentation: a task that was tried again may have stored it twice."""
    if not table.num_columns:
        return _AUGMENTATION.empty_table()
    numbered = table.select(["key", "augmentation"]).append_column("row", pa.array(range(table.num_rows)))
    return table.take(numbered.group_by(["key", "augmentation"]).aggregate([("row", "min")])["row_min"])
