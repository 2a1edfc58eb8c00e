"""The header of a safetensors file: which tensors it holds, and where their bytes lie.

The safetensors library gives tensors, but neither their byte ranges nor their raw bytes one at a time. And it writes
tensors that exist already, in three copies; who knows the header beforehand can compute them in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prag_core.data.parsing import parse_json

# The library refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo(NamedTuple):
    """One tensor of a file; its bytes are those from position `begin` up to `end` of the file."""

    dtype: str
    shape: Sequence[int]
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    """The tensors of a file by name, its metadata, and the position at which the tensors begin."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size_bytes: int


def read_header(read: Callable[[int, int], bytes]) -> SafetensorsHeader:
    """Return the header of a safetensors file: eight bytes of length, and a JSON object of that length.

    Args:
        read: Returns the file's bytes from one position up to another.

    Raises:
        ValueError: when this is no such header.
    """
    length = int.from_bytes(read(0, 8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"no safetensors header: it would have {length} bytes")
    size_bytes = 8 + length
    try:
        entries: dict[str, Any] = parse_json(read(8, size_bytes).decode())
        metadata = entries.pop("__metadata__", {})
        tensors = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], entry["shape"]
            if any(type(number) is not int or number < 0 for number in (begin, end, *shape)) or begin > end:
                raise ValueError(f"the tensor {name} has the shape {shape} and the bytes {begin} to {end}")
            tensors[name] = TensorInfo(str(dtype), shape, size_bytes + begin, size_bytes + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header: {error}") from None
    return SafetensorsHeader(tensors, metadata, size_bytes)


def write_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file, up to the byte at which the tensors begin.

    `begin` and `end` of each tensor are counted from that byte. A reader wants tensors that lie in order and side by
    side.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        offsets = [tensor.begin, tensor.end]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors must begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
