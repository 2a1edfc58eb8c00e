"""Records survive Arrow and Parquet as they were."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from prag_core.records import Augmentation, LedgerRow, Passage, Reject, from_table, schema, to_table
from tests.helpers.passages import make_augmentation, make_passage


@pytest.mark.parametrize("record", [Passage, Augmentation, LedgerRow, Reject])
def test_no_rows_keep_their_columns(record: type) -> None:
    table = to_table(record, [])
    assert table.schema == schema(record)
    assert from_table(record, table) == []


def test_records_come_back_as_they_were() -> None:
    passages = [make_passage(n) for n in range(3)]
    augmentations = [make_augmentation(passage, pairs=n) for n, passage in enumerate(passages)]
    assert from_table(Passage, to_table(Passage, passages)) == passages
    assert from_table(Augmentation, to_table(Augmentation, augmentations)) == augmentations


def test_unknown_columns_are_ignored() -> None:
    passages = [make_passage(1)]
    table = to_table(Passage, passages).append_column("new", pa.array(["x"]))
    assert from_table(Passage, table) == passages


def test_the_digest_is_of_the_content_alone() -> None:
    one = make_augmentation(make_passage(1))
    assert replace(one, seconds=9.0, attempts=3, origin="generated", refused=("empty=1",)).digest == one.digest
    assert replace(one, rewrites=()).digest != one.digest
    assert replace(one, pairs=one.pairs[:2]).digest != one.digest
