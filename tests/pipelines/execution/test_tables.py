"""Few rows are joined without actors, with the same result as a shuffle gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray.data

from cluster.resources import PROFILES, Profile
from pipelines.execution.survey import survey, with_augmentations, with_passages
from pipelines.execution.tables import _join, group_by_columns, iter_blocks, map_blocks, read_parts
from prag_core.config import AugmentConfig, TrainConfig, augment_recipe, train_recipe
from prag_core.recipe import Recipe
from prag_core.records import Passage, schema, to_table
from prag_core.store.objects import Store
from prag_core.store.tables import put_augmentations
from tests.helpers.passages import make_augmentation, make_passage

PASSAGES = [make_passage(n) for n in range(9)]


def test_a_join_keeps_columns_order_and_types() -> None:
    table = to_table(Passage, PASSAGES)
    wanted = [PASSAGES[5].key, "0" * 32, PASSAGES[2].key]
    few = pa.table({"key": wanted, "augmentation": ["a", "b", "c"]})
    joined = _join(table, few, ["key"])
    assert joined.schema == pa.schema([*schema(Passage), pa.field("augmentation", pa.string())])
    assert joined["augmentation"].to_pylist() == ["c", "a"]
    assert joined.select(schema(Passage).names).equals(table.take([2, 5]))
    nothing = _join(table, few.slice(1, 1), ["key"])
    assert (nothing.num_rows, nothing.schema) == (0, joined.schema)


def test_rows_that_differ_in_one_column_of_two_are_not_joined() -> None:
    rows = pa.table({"key": ["k", "k", "l"], "augmentation": ["a", "b", "a"], "text": ["1", "2", "3"]})
    few = pa.table({"key": ["k", "l"], "augmentation": ["b", "b"], "title": ["x", "y"]})
    expected = [{"key": "k", "augmentation": "b", "text": "2", "title": "x"}]
    assert _join(rows, few, ["key", "augmentation"]).to_pylist() == expected


def test_how_many_blocks() -> None:
    profile = PROFILES["cluster"]
    assert [profile.blocks(n) for n in (0, profile.rows_per_task, profile.rows_per_task + 1)] == [1, 1, 256]
    # A configured number of partitions always holds.
    assert PROFILES["laptop"].tuned(partitions=3).blocks(1) == 3


@pytest.mark.slow
def test_no_function_is_called_with_an_empty_block(ray_here: str) -> None:
    def keep_one(table: pa.Table) -> pa.Table:
        return table.filter(pc.equal(table["key"], 1))

    def count(table: pa.Table) -> pa.Table:
        return pa.table({"rows": [table.num_rows]})

    some = map_blocks(ray.data.from_items([{"key": n} for n in range(4)], override_num_blocks=4), keep_one)
    none = map_blocks(ray.data.from_items([{"key": 2}, {"key": 3}], override_num_blocks=2), keep_one)
    datasets = some, none, none.materialize(), group_by_columns(some, ["key"], 3), some.union(none)
    counted = [[row["rows"] for row in map_blocks(rows, count).iter_rows()] for rows in datasets]
    assert counted == [[1], [], [], [1], [1]]
    assert [block.num_rows for block in iter_blocks(none)] == []


@pytest.mark.slow
def test_few_rows_and_many_rows_give_the_same_join(tmp_path: Path, ray_here: str) -> None:
    store = Store(str(tmp_path / "store"))
    for begin in (0, 3, 6):
        store.put_table("corpus", to_table(Passage, PASSAGES[begin : begin + 3]))
    stored = [make_augmentation(passage) for passage in PASSAGES[1:8]]
    train = train_recipe(TrainConfig())
    recipe = Recipe("base", augment_recipe(AugmentConfig(), "none", train), train)
    augmenting = recipe.augment.fingerprint
    put_augmentations(store, augmenting, stored[:4])
    put_augmentations(store, augmenting, stored[3:])  # one of them again
    put_augmentations(store, augmenting, [make_augmentation(make_passage(77))])  # of another corpus
    few, many = (
        _surveyed(store, recipe, profile) for profile in (PROFILES["laptop"], PROFILES["laptop"].tuned(partitions=3))
    )
    assert few == many
    counts, lacking, ready = few
    assert counts == {"to_augment": 2, "to_train": 7}
    assert [row["key"] for row in lacking] == sorted(PASSAGES[n].key for n in (0, 8))
    assert [(row["key"], row["text"], row["augmentation"]) for row in ready] == sorted(
        (passage.key, passage.text, augmentation.digest)
        for passage, augmentation in zip(PASSAGES[1:8], stored, strict=True)
    )
    assert all(len(row["pairs"]) == 3 and row["rewrites"] for row in ready)


def _surveyed(store: Store, recipe: Recipe, profile: Profile) -> tuple[dict[str, int], list[Any], list[Any]]:
    """Return the counts of a survey, the passages that lack an augmentation and those that are ready for training."""
    passages = read_parts(store, "corpus", schema(Passage).names, profile.partitions)
    found = survey(store, passages, 9, recipe, profile)
    lacking = with_passages(found, "to_augment", passages, profile)
    ready = with_augmentations(store, found, "to_train", passages, recipe.augment.fingerprint, profile)
    return found.counts, *(sorted(rows.take_all(), key=lambda row: row["key"]) for rows in (lacking, ready))
