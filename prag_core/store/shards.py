"""Shards as bytes: checking them against the ledger, and moving the good adapters of one into another.

A safetensors object is eight bytes of header length, a JSON header, and the tensors; an adapter is a range of the
latter (`prag_core.store.shard_codec`). Moving an adapter copies its range as it is, whatever its dtype, so nothing is
rounded and its ledger checksum stays. Importing this loads no torch: a fast check needs none.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import safetensors

from prag_core.errors import StoreError, UnreachableError
from prag_core.identity import checksum
from prag_core.records import LedgerRow, from_table, to_table
from prag_core.store.objects import Store

# ---- moving adapters


def replace_rows(store: Store, part: str, bad: Mapping[str, Collection[str]]) -> tuple[str | None, list[str]]:
    """Write a ledger part in place of `part` that names nothing of the shards in `bad`.

    `bad` maps shards to the keys that are given up; the other adapters of these shards move into new ones. First
    come the new shards, then the new ledger part; the old ones are left for the caller to remove, so that a kill in
    between loses nothing: the same call again writes the same objects.

    Returns:
        The new part's name, or None when no row is left, and the keys of the rows that were given up.

    Raises:
        StoreError: when the part cannot be read, or the store cannot be written.
    """
    rows = from_table(LedgerRow, store.get_table(LedgerRow, [part]))
    kept = [row for row in rows if row.shard not in bad]
    for shard in sorted(bad):
        kept += move_adapters(store, shard, [row for row in rows if row.shard == shard and row.key not in bad[shard]])
    survived = {(row.key, row.checksum, row.created) for row in kept}
    lost = sorted({row.key for row in rows if (row.key, row.checksum, row.created) not in survived})
    name = store.put_table(posixpath.dirname(part), to_table(LedgerRow, kept)) if kept else None
    return name, lost


def move_adapters(store: Store, shard: str, rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Copy adapters of a shard, bit by bit, into a new shard, and return their rows with their new place.

    Left out are those whose bytes are not what their rows say, and all of them when the header is unreadable or
    does not describe them.

    Raises:
        UnreachableError: when the store cannot be asked.
        StoreError: when the new shard cannot be written.
    """
    try:
        data = store.get(shard)
        rows = [row for row in rows if checksum(data[row.offset : row.offset + row.length]) == row.checksum]
        packed, moved = _repack(data, rows)
        safetensors.deserialize(packed)  # type: ignore[no-untyped-call]
    except UnreachableError:
        raise
    except (StoreError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        return []
    if not moved:
        return []
    name = f"{posixpath.dirname(shard)}/{checksum(packed)}.safetensors"
    store.put(name, packed)
    return [replace(row, shard=name) for row in moved]


def keys_in(store: Store, shard: str) -> tuple[set[str], int] | None:
    """Return the keys of all adapters that a shard holds, named by a ledger or not, and the bytes of its tensors.

    None when the shard is missing or its header is damaged.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    try:
        size = store.size(shard)
        begin = 8 + int.from_bytes(store.get(shard, 0, 8), "little")
        if size is None or begin > size:
            return None
        header = json.loads(store.get(shard, 8, begin))
        return {name.split("/")[0] for name in header if name != "__metadata__"}, size - begin
    except UnreachableError:
        raise
    except (StoreError, ValueError, TypeError, AttributeError):
        return None


def _repack(data: bytes, rows: Sequence[LedgerRow]) -> tuple[bytes, list[LedgerRow]]:
    begin = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:begin])
    made: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    body = bytearray()
    moved = []
    for row in sorted(rows, key=lambda row: row.offset):
        shift = len(body) - (row.offset - begin)
        size = 0
        for name, entry in header.items():
            if name == row.key or name.startswith(f"{row.key}/"):  # int8 has one tensor an adapter
                first, last = entry["data_offsets"]
                made[name] = {**entry, "data_offsets": [first + shift, last + shift]}
                size += last - first
        if size != row.length:
            raise ValueError(f"{row.key}: the header has {size} bytes for it, the ledger {row.length}")
        moved.append(replace(row, offset=len(body)))
        body += data[row.offset : row.offset + row.length]
    text = json.dumps(made, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    start = 8 + len(text)
    packed = len(text).to_bytes(8, "little") + text + bytes(body)
    return packed, [replace(row, offset=start + row.offset) for row in moved]
