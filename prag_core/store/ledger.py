"""The ledger: where the adapter of each passage lies, for millions of passages, and which parts of it count."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prag_core.errors import DamagedError
from prag_core.identity import KEY_BYTES, is_checksum
from prag_core.store.objects import Store

READERS = 8

_COLUMNS = ["key", "checksum", "shard", "dtype", "offset", "length", "created", "tokens", "last_loss", "seconds"]
# Keys and checksums are bytes: half as long as their hexadecimal digits, and in the same order. Shard and dtype are
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
        ("tokens", np.int64),
        ("last_loss", np.float32),
        ("seconds", np.float32),
    ]
)


@dataclass(frozen=True, slots=True)
class AdapterLocation:
    """The fields of a ledger row that are needed to read its adapter, and how its training went."""

    key: str
    shard: str
    offset: int
    length: int
    checksum: str
    dtype: str
    tokens: int = 0
    last_loss: float = 0.0
    seconds: float = 0.0


class LedgerColumns:
    """The rows of some ledger parts as a numpy array sorted by key, which takes 96 bytes for each adapter.

    Of several rows with one key, the one that was created last counts: a changed augmentation adds a row.

    Raises:
        DamagedError: if a part is missing or damaged.
    """

    def __init__(self, store: Store, parts: Sequence[str]) -> None:
        self._names: dict[str, int] = {}
        self._names_lock = threading.Lock()
        # A remote store takes long to answer, so several parts are read at the same time.
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(lambda part: self._encode_rows(part, store.get_part(part, _COLUMNS)), parts)
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

    def find(self, key: str) -> AdapterLocation | None:
        """Return where the adapter of a passage lies, or None if there is none."""
        if not is_checksum(key):
            return None
        wanted = bytes.fromhex(key).rstrip(b"\0")  # numpy drops zeros at the end of a value
        position = int(np.searchsorted(self._keys, np.bytes_(wanted)))
        if position == len(self._keys) or self._keys[position] != wanted:
            return None
        row = self._rows[position]
        return AdapterLocation(
            key=key,
            shard=self._list[row["shard"]],
            offset=int(row["offset"]),
            length=int(row["length"]),
            checksum=row["checksum"].ljust(KEY_BYTES, b"\0").hex(),
            dtype=self._list[row["dtype"]],
            tokens=int(row["tokens"]),
            last_loss=float(row["last_loss"]),
            seconds=float(row["seconds"]),
        )

    def _encode_rows(self, part: str, table: pa.Table) -> npt.NDArray[Any]:
        rows = np.empty(table.num_rows, _ROW)
        for name in ("key", "checksum"):
            rows[name] = _decode_hex(table[name], f"{part}: {name}")
        for name in ("shard", "dtype"):
            coded = table[name].combine_chunks().dictionary_encode()
            with self._names_lock:
                codes = [self._names.setdefault(value, len(self._names)) for value in coded.dictionary.to_pylist()]
            rows[name] = np.array(codes, np.int32)[coded.indices.to_numpy()]
        for name in ("offset", "length", "created", "tokens", "last_loss", "seconds"):
            rows[name] = table[name].to_numpy()
        return rows


def _decode_hex(column: pa.ChunkedArray, what: str) -> npt.NDArray[np.bytes_]:
    """Return the bytes of a column of hexadecimal keys or checksums; `what` names the column in the error."""
    digits = 2 * KEY_BYTES
    values = column.combine_chunks()
    try:
        if not pc.all(pc.equal(pc.binary_length(values), digits), min_count=0).as_py():
            raise ValueError
        # The padding adds nothing, but makes a new array, whose first value begins at the first byte of its buffer.
        text = pc.ascii_rpad(values, digits).buffers()[2] if len(values) else b""
        found = bytes.fromhex(str(text, "ascii"))
        return np.frombuffer(found, f"S{KEY_BYTES}", len(values))
    except ValueError:
        raise DamagedError(f"{what} is not {digits} hexadecimal digits, so this is not a ledger part") from None


@dataclass(frozen=True)
class Compaction:
    """The ledger parts that a compaction wrote, and the parts that they replace."""

    parts: tuple[str, ...]
    replaces: tuple[str, ...]


def visible_parts(store: Store, recipe: str) -> list[str]:
    """Return the ledger parts of a recipe that count now: all that no compaction has replaced."""
    parts = store.list(f"adapters/{recipe}/ledger", ".parquet")
    replaced = replaced_parts(store, recipe, parts)
    return [part for part in parts if part not in replaced]


def replaced_parts(store: Store, recipe: str, parts: Collection[str]) -> set[str]:
    """Return those of a recipe's ledger parts that compactions have replaced.

    If a part that a compaction wrote is missing from `parts` (it was damaged, and removed by a repair), the compaction
    replaces nothing: to read a row twice does no harm, but to lose one would.
    """
    found: set[str] = set()
    for compaction in compactions(store, recipe).values():
        if {*compaction.parts} <= {*parts}:
            found |= {*compaction.replaces} & {*parts}
    return found


def compactions(store: Store, recipe: str) -> dict[str, Compaction]:
    """Return a recipe's compactions by the names of their records, without the damaged ones."""
    found = {}
    for name in store.list(f"adapters/{recipe}/compactions", ".json"):
        try:
            document = store.get_sealed(name, "parts", "replaces")
            found[name] = Compaction(tuple(document["parts"]), tuple(document["replaces"]))
        except DamagedError:
            continue
    return found
