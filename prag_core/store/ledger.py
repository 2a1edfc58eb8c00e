"""The ledger of a snapshot as columns: where the adapter of a passage lies, for millions of passages at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prag_core.errors import StoreError
from prag_core.identity import KEY_BYTES, is_checksum, is_intact
from prag_core.store.objects import Store

READERS = 8

_COLUMNS = ["key", "checksum", "shard", "dtype", "offset", "length", "created"]
# Keys and checksums as bytes, which are half of their hexadecimal digits and have the same order; shard and dtype as
# positions in a list of names.
_ROW = np.dtype(
    [
        ("key", f"S{KEY_BYTES}"),
        ("checksum", f"S{KEY_BYTES}"),
        ("shard", np.int32),
        ("dtype", np.int32),
        ("offset", np.int64),
        ("length", np.int64),
        ("created", np.float64),
    ]
)


@dataclass(frozen=True, slots=True)
class Located:
    """Where one adapter lies: what of its ledger row is needed to read it."""

    key: str
    shard: str
    offset: int
    length: int
    checksum: str
    dtype: str


class LedgerColumns:
    """The rows of some ledger parts, sorted by key: 80 bytes an adapter and no Python object.

    Of several rows of a key the one that was created last counts: a changed augmentation adds a row, it edits none.

    Raises:
        StoreError: when a part is missing or damaged.
    """

    def __init__(self, store: Store, parts: Sequence[str]) -> None:
        self._names: dict[str, int] = {}
        self._naming = threading.Lock()
        # A store far away answers late, and several parts can be asked for at once.
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(lambda part: self._rows_of(part, store.get_part(part, _COLUMNS)), parts)
            rows = np.concatenate([np.empty(0, _ROW), *read])
        order = np.argsort(rows["created"], kind="stable")
        order = order[np.argsort(rows["key"][order], kind="stable")]
        keys = rows["key"][order]
        last = np.ones(len(keys), dtype=bool)
        last[:-1] = keys[1:] != keys[:-1]
        self._rows = rows[order[last]]
        self._keys = np.ascontiguousarray(self._rows["key"])
        self._list = list(self._names)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: str) -> Located | None:
        """Return where the adapter of a key lies, or None when there is none."""
        if not is_checksum(key):
            return None
        wanted = bytes.fromhex(key).rstrip(b"\0")  # as numpy gives a value back: without zeros at its end
        position = int(np.searchsorted(self._keys, np.bytes_(wanted)))
        if position == len(self._keys) or self._keys[position] != wanted:
            return None
        row = self._rows[position]
        return Located(
            key=key,
            shard=self._list[row["shard"]],
            offset=int(row["offset"]),
            length=int(row["length"]),
            checksum=row["checksum"].ljust(KEY_BYTES, b"\0").hex(),
            dtype=self._list[row["dtype"]],
        )

    def _rows_of(self, part: str, table: pa.Table) -> npt.NDArray[Any]:
        rows = np.empty(table.num_rows, _ROW)
        for name in ("key", "checksum"):
            rows[name] = _bytes_of(table[name], f"{part}: {name}")
        for name in ("shard", "dtype"):
            coded = table[name].combine_chunks().dictionary_encode()
            with self._naming:
                codes = [self._names.setdefault(value, len(self._names)) for value in coded.dictionary.to_pylist()]
            rows[name] = np.array(codes, np.int32)[coded.indices.to_numpy()]
        for name in ("offset", "length", "created"):
            rows[name] = table[name].to_numpy()
        return rows


def _bytes_of(column: pa.ChunkedArray, what: str) -> npt.NDArray[np.bytes_]:
    """Return the bytes that the digits of keys or checksums stand for."""
    digits = 2 * KEY_BYTES
    values = column.combine_chunks()
    try:
        if not pc.all(pc.equal(pc.binary_length(values), digits), min_count=0).as_py():
            raise ValueError
        # Padded by nothing: a new array, in which the first value begins at the first byte.
        text = pc.ascii_rpad(values, digits).buffers()[2] if len(values) else b""
        found = bytes.fromhex(str(text, "ascii"))
        return np.frombuffer(found, f"S{KEY_BYTES}", len(values))
    except ValueError:
        raise StoreError(f"{what} is not {digits} hexadecimal digits", "it is no ledger part of ours") from None


@dataclass(frozen=True)
class Compaction:
    """Which ledger parts of a recipe took the place of which."""

    parts: tuple[str, ...]
    replaces: tuple[str, ...]


def visible_parts(store: Store, recipe: str) -> list[str]:
    """Return the ledger parts of a recipe that count now: all that there are, but for those that were replaced.

    Raises:
        StoreError: when the store cannot be read.
    """
    parts = store.list(f"adapters/{recipe}/ledger", ".parquet")
    replaced = replaced_parts(store, recipe, parts)
    return [part for part in parts if part not in replaced]


def replaced_parts(store: Store, recipe: str, parts: Collection[str]) -> set[str]:
    """Return which of a recipe's ledger parts others have replaced.

    A compaction whose own parts are not all there (one was damaged and repaired) replaces nothing: reading a row
    twice does no harm, and losing one would.
    """
    found: set[str] = set()
    for compaction in compactions(store, recipe).values():
        if {*compaction.parts} <= {*parts}:
            found |= {*compaction.replaces} & {*parts}
    return found


def compactions(store: Store, recipe: str) -> dict[str, Compaction]:
    """Return a recipe's compactions by the names of their records; damaged records are left out.

    Raises:
        StoreError: when the store cannot be read.
    """
    found = {}
    for name in store.list(f"adapters/{recipe}/compactions", ".json"):
        compaction = parse_compaction(store.get(name))
        if compaction is not None:
            found[name] = compaction
    return found


def parse_compaction(data: bytes) -> Compaction | None:
    """Return what a record says, or None when it is damaged."""
    try:
        document = json.loads(data)
        if is_intact(document):
            return Compaction(tuple(document["parts"]), tuple(document["replaces"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return None
