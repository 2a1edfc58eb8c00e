"""The ledger as columns: the latest row of each key, from any number of parts."""

from __future__ import annotations

import itertools
import random

import pytest

from prag_core.errors import StoreError
from prag_core.records import LedgerRow, to_table
from prag_core.store.ledger import AdapterLocation, LedgerColumns
from prag_core.store.objects import Store


def row(dice: random.Random, key: str, created: float) -> LedgerRow:
    return LedgerRow(
        key=key,
        recipe="recipe",
        augmentation="digest",
        shard=f"adapters/recipe/shards/{dice.randrange(9)}.safetensors",
        offset=dice.randrange(10**12),
        length=dice.randrange(10**7),
        checksum=f"{dice.getrandbits(120):030x}{dice.choice(['00', 'ff'])}",
        dtype=dice.choice(["bfloat16", "int8"]),
        steps=1,
        tokens=1,
        first_loss=1.0,
        last_loss=1.0,
        seconds=1.0,
        created=created,
    )


def test_the_latest_row_of_each_key_is_found(store: Store) -> None:
    dice = random.Random(1)
    keys = [f"{dice.getrandbits(128):032x}" for _ in range(300)]
    # Bytes of zero at the end are part of a key.
    keys[:3] = [f"{n}".ljust(32, "0") for n in ("abcd", "abcd01", "0")]
    rows = [row(dice, dice.choice(keys), float(n)) for n in range(500)]
    latest = {row.key: row for row in rows}
    dice.shuffle(rows)
    cuts = [0, 1, 100, 101, 350, 500]
    parts = [store.put_table("ledger", to_table(LedgerRow, rows[begin:end])) for begin, end in itertools.pairwise(cuts)]
    parts.append(store.put_table("ledger", to_table(LedgerRow, [])))
    ledger = LedgerColumns(store, parts)
    assert len(ledger) == len(latest)
    for key in keys:
        expected = latest.get(key)
        located = expected and AdapterLocation(
            key=key,
            shard=expected.shard,
            offset=expected.offset,
            length=expected.length,
            checksum=expected.checksum,
            dtype=expected.dtype,
            tokens=expected.tokens,
            last_loss=expected.last_loss,
            seconds=expected.seconds,
        )
        assert ledger.find(key) == located
    for stranger in ("", "0", "f" * 32, "f" * 33, "ü", keys[9][:-1], keys[9] + "0", "abcd", "z" * 32):
        assert ledger.find(stranger) is None


def test_an_altered_part_is_no_ledger(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another key in a row would give a passage the adapter of another one, with a checksum that fits."""
    monkeypatch.setattr("prag_core.store.objects.WHOLE_PART_BYTES", 0)  # as if it were a big one
    dice = random.Random(3)
    part = store.put_table("ledger", to_table(LedgerRow, [row(dice, f"{n:032x}", 1.0) for n in range(50)]))
    data = store.get(part)
    for place in dice.sample(range(len(data)), 40):
        store.put(part, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(StoreError, match="altered or cut short"):
            LedgerColumns(store, [part])


def test_an_empty_ledger_and_malformed_keys(store: Store) -> None:
    empty = LedgerColumns(store, [])
    assert (len(empty), empty.find("a" * 32)) == (0, None)
    for key in ("a" * 33, "a" * 30 + "  ", "k" * 32, "a" * 31 + "ü", ""):
        other = store.put_table("ledger", to_table(LedgerRow, [row(random.Random(1), key, 1.0)]))
        with pytest.raises(StoreError, match="key is not 32 hexadecimal digits"):
            LedgerColumns(store, [other])
    with pytest.raises(StoreError, match="no such object"):
        LedgerColumns(store, ["ledger/none.parquet"])
