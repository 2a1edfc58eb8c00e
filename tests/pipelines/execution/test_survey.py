"""A survey turns the facts that the store holds about each key into states."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.execution.survey import _FACT, _count, _states, _stored_facts, _unique
from prag_core.records import Reject
from prag_core.store.objects import Store
from prag_core.store.tables import put_augmentations, put_rejects
from tests.helpers.passages import make_augmentation, make_passage


def states(*facts: tuple[str, str, str | None]) -> dict[str, tuple[str, str | None, str | None]]:
    columns = [pa.array([fact[i] for fact in facts], pa.string()) for i in range(3)]
    rows = _states(pa.table(columns, schema=_FACT)).to_pylist()
    return {row["key"]: (row["state"], row["augmentation"], row["reason"]) for row in rows}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([], ("to_augment", None, None)),
        ([("augment_rejected", "no_usable_pair")], ("augment_rejected", None, "no_usable_pair")),
        ([("augmentation", "d1")], ("to_train", "d1", None)),
        # Augmented after all: the reject of an earlier run does not count.
        ([("augment_rejected", "no_usable_pair"), ("augmentation", "d1")], ("to_train", "d1", None)),
        ([("augmentation", "d1"), ("train_rejected", "loss_not_finite")], ("train_rejected", "d1", "loss_not_finite")),
        ([("augmentation", "d1"), ("adapter", "d1")], ("done", "d1", None)),
        ([("augmentation", "d1"), ("adapter", "d1"), ("train_rejected", "loss_not_finite")], ("done", "d1", None)),
        # The augmentation changed: the adapter was trained on another text.
        ([("augmentation", "d2"), ("adapter", "d1")], ("to_train", "d2", None)),
        # A retried task stored two augmentations: the one with the smallest digest counts, whichever came first.
        ([("augmentation", "d2"), ("augmentation", "d1"), ("adapter", "d1"), ("adapter", "d1")], ("done", "d1", None)),
    ],
)
def test_the_state_of_a_passage(facts: list, expected: tuple) -> None:
    found = states(("k", "passage", None), *(("k", kind, value) for kind, value in facts))
    assert found == {"k": expected}


def test_keys_outside_the_corpus_do_not_count() -> None:
    found = states(("a", "passage", None), ("b", "adapter", "d"), ("b", "augmentation", "d"), ("b", "x", None))
    assert set(found) == {"a"}


def test_counts_are_by_state_and_reason() -> None:
    rows = [("a", "passage", None), ("b", "passage", None), ("b", "augment_rejected", "r"), ("c", "passage", None)]
    table = _states(pa.table([pa.array([r[i] for r in rows], pa.string()) for i in range(3)], schema=_FACT))
    counted = {(row["state"], row["reason"]): row["count"] for row in _count(table).to_pylist()}
    assert counted == {("to_augment", None): 2, ("augment_rejected", "r"): 1}


def test_rejects_of_other_recipes_and_for_transient_reasons_are_left_out(tmp_path) -> None:
    store = Store(str(tmp_path / "store"))
    passage = make_passage(1)
    augmentation = make_augmentation(passage)
    part = put_augmentations(store, "recipe", [augmentation])
    put_rejects(
        store,
        "run",
        [
            Reject("augment", "no_usable_pair", "", "s", "k1", recipe="recipe"),
            Reject("augment", "no_usable_pair", "", "s", "k2", recipe="other"),
            Reject("augment", "generation_failed", "", "s", "k3", recipe="recipe"),
            Reject("augment", "out_of_memory", "", "s", "k4", recipe="recipe"),
        ],
    )
    (rejects,) = store.list("rejects/augment", ".parquet")
    sources = [
        {"kind": "augmentation", "column": "digest", "recipe": "", "part": part},
        {"kind": "augment_rejected", "column": "reason", "recipe": "recipe", "part": rejects},
    ]
    read = pa.concat_tables(_stored_facts(pa.Table.from_pylist(sources), store)).to_pylist()
    assert [tuple(row.values()) for row in read] == [
        (passage.key, "augmentation", augmentation.digest),
        ("k1", "augment_rejected", "no_usable_pair"),
    ]


def test_an_augmentation_that_was_stored_twice_is_one(tmp_path) -> None:
    store = Store(str(tmp_path / "store"))
    first, second = (make_augmentation(make_passage(n)) for n in (1, 2))
    part = put_augmentations(store, "recipe", [first, second, first])
    table = store.get_columns(part, ["digest", "key", "rewrites", "pairs", "origin"])
    table = table.rename_columns(["augmentation", *table.column_names[1:]])
    assert _unique(table).to_pylist() == table.slice(0, 2).to_pylist()
