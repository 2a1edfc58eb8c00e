"""Rejects and passages as Parquet parts of the store."""

from __future__ import annotations

import pytest

from prag_core.errors import InputError
from prag_core.records import Reject, from_table
from prag_core.store.objects import Store
from prag_core.store.tables import clear_rejects, find_passages, put_rejects
from tests.helpers.stores import (
    PASSAGES,
    VERSION,
    verify,
    write_corpus,
)


def test_rejects_are_cleared_by_stage_and_reason(store: Store) -> None:
    def reasons() -> list[str]:
        rows = from_table(Reject, store.get_table(Reject, store.list("rejects", ".parquet")))
        return sorted(f"{row.stage}/{row.reason}/{row.key}" for row in rows)

    put_rejects(store, "run0", [Reject("augment", "no_pairs", "", "p99", "k99")])
    rows = [Reject("augment", reason, "", f"p{n}", f"k{n}") for n, reason in enumerate(["no_pairs", "other"])]
    put_rejects(store, "run1", [*rows, Reject("train", "loss_not_finite", "", "p7", "k7")])
    put_rejects(store, "run2", rows)  # the same again, by another run
    assert clear_rejects(store, "augment", "nothing like it") == 0
    assert clear_rejects(store, "train", "no_pairs") == 0
    assert clear_rejects(store, "augment", "no_pairs") == 2  # k0 and k99
    assert set(reasons()) == {"augment/other/k1", "train/loss_not_finite/k7"}
    assert verify(store) == []
    assert clear_rejects(store, None, None) == 2
    assert reasons() == []


def test_passages_are_found_by_key_and_by_id(store: Store) -> None:
    write_corpus(store, VERSION, PASSAGES)
    known = find_passages(store, VERSION, ["p3", PASSAGES[5].key, "p3", "f" * 32])
    assert sorted((passage.key, passage.sources) for passage in known) == sorted(
        [(PASSAGES[3].key, ("p3",)), (PASSAGES[5].key, ("p5",))]
    )
    with pytest.raises(InputError, match="has no passage nobody"):
        find_passages(store, VERSION, ["p3", "nobody"])
    with pytest.raises(InputError, match=r"has no passage caf\\xe9"):
        find_passages(store, VERSION, ["caf\udce9"])  # as a terminal passes bytes that are not UTF-8
