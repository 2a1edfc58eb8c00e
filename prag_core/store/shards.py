"""Moving adapters from one shard into another, as bytes.

A shard is a safetensors file, and an adapter is a range of its bytes (`prag_core.store.shard_codec`). A moved adapter
is copied bit by bit, whatever its dtype: nothing is rounded, and the checksum in its ledger row stays right. This
module imports no torch.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import safetensors

from prag_core.errors import DamagedError
from prag_core.identity import checksum
from prag_core.llm.safetensors_header import TensorInfo, read_header, write_header
from prag_core.records import LedgerRow, from_table, to_table
from prag_core.store.objects import Store


def replace_rows(store: Store, part: str, bad: Mapping[str, Collection[str]]) -> tuple[str | None, list[str]]:
    """Write a ledger part that replaces `part` and names none of the shards in `bad`.

    `bad` gives the keys of the damaged adapters by shard; the good adapters of these shards move into new shards. New
    shards are written first, then the new ledger part. The caller removes the old objects. So a kill loses nothing,
    and the same call afterwards writes the same objects.

    Returns:
        The name of the new part, or None if no row is left, and the keys of the rows that were dropped.

    Raises:
        StoreError: if the part cannot be read, or the store cannot be written.
    """
    rows = from_table(LedgerRow, store.get_table(LedgerRow, [part]))
    kept = [row for row in rows if row.shard not in bad]
    for shard in sorted(bad):
        kept += move_adapters(store, shard, [row for row in rows if row.shard == shard and row.key not in bad[shard]])
    survived = {(row.key, row.checksum, row.created) for row in kept}
    dropped = sorted({row.key for row in rows if (row.key, row.checksum, row.created) not in survived})
    name = store.put_table(posixpath.dirname(part), to_table(LedgerRow, kept)) if kept else None
    return name, dropped


def move_adapters(store: Store, shard: str, rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Copy adapters of a shard into a new shard, and return their rows with shard and offset changed.

    An adapter is left out if its bytes do not match the checksum in its row. All are left out if the shard's header
    is unreadable or does not describe them.

    Raises:
        UnreachableError: if the store does not answer.
        StoreError: if the new shard cannot be written.
    """
    try:
        data = store.get(shard)
        rows = [row for row in rows if checksum(data[row.offset : row.offset + row.length]) == row.checksum]
        packed, moved = _repack(data, rows)
        safetensors.deserialize(packed)  # type: ignore[no-untyped-call]
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        return []
    if not moved:
        return []
    name = f"{posixpath.dirname(shard)}/{checksum(packed)}.safetensors"
    store.put(name, packed)
    return [replace(row, shard=name) for row in moved]


def keys_in(store: Store, shard: str) -> tuple[set[str], int] | None:
    """Return the keys of all adapters in a shard, named by a ledger or not, and the size of its tensors in bytes.

    Return None if the shard is missing or its header is damaged.
    """
    try:
        size_bytes = store.size(shard)
        header = read_header(lambda begin, end: store.get(shard, begin, end))
    except (DamagedError, ValueError):
        return None
    if size_bytes is None or size_bytes < header.size_bytes:
        return None
    return {name.split("/")[0] for name in header.tensors}, size_bytes - header.size_bytes


def _repack(data: bytes, rows: Sequence[LedgerRow]) -> tuple[bytes, list[LedgerRow]]:
    """Return a shard that holds only the adapters of `rows`, and these rows with their offsets in it."""
    header = read_header(lambda begin, end: data[begin:end])
    tensors: dict[str, TensorInfo] = {}
    body = bytearray()
    moved = []
    for row in sorted(rows, key=lambda row: row.offset):
        size_bytes = 0
        for name, tensor in header.tensors.items():
            if name == row.key or name.startswith(f"{row.key}/"):  # an int8 adapter is one tensor, named by its key
                shift = len(body) - row.offset
                tensors[name] = tensor._replace(begin=tensor.begin + shift, end=tensor.end + shift)
                size_bytes += tensor.end - tensor.begin
        if size_bytes != row.length:
            raise ValueError(f"{row.key}: the header has {size_bytes} bytes for it, the ledger {row.length}")
        moved.append(replace(row, offset=len(body)))
        body += data[row.offset : row.offset + row.length]
    begin = write_header(tensors, header.metadata)
    return begin + bytes(body), [replace(row, offset=len(begin) + row.offset) for row in moved]
