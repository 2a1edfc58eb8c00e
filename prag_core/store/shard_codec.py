"""Adapters as bytes: many are packed into one safetensors shard, and one is unpacked from its byte range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prag_core.errors import REPAIR, AdapterError
from prag_core.identity import checksum
from prag_core.llm.layout import (
    GROUP,
    INT8,
    SCALE_UNIT,
    STORED_BYTES,
    LoraLayout,
    adapter_size_bytes,
    check_length,
    groups_of,
)
from prag_core.llm.lora import Factors, check_factors, check_shapes
from prag_core.llm.safetensors_header import TensorInfo, write_header

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORED_BYTES}
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PackedAdapter:
    """Where one adapter lies in a shard: its byte offset and length, and the checksum of these bytes."""

    key: str
    offset: int
    length: int
    checksum: str


def pack_shard(
    layout: LoraLayout, adapters: Sequence[tuple[str, Factors]], dtype: str, metadata: Mapping[str, str]
) -> tuple[bytes, list[PackedAdapter]]:
    """Return the bytes of a shard and where each adapter lies in it.

    As floats, an adapter is a few stacked tensors `<key>/<target>.A` `[layers, rank, inputs]` and `<key>/<target>.B`
    `[layers, outputs, rank]`. They lie side by side, so that one ranged read fetches them. As int8 it is one tensor
    `<key>` of bytes: first all scales, then all values, both in the order of the tensors' names. (As two tensors,
    safetensors would not keep scales and values together.) `metadata` goes into the header, with the dtype and, for
    int8, that order.

    Raises:
        AdapterError: if an adapter does not fit the layout or the dtype, or holds values that are not finite.
    """
    size = adapter_size_bytes(layout, dtype)
    described = {**metadata, "dtype": dtype}
    if dtype == INT8:
        described |= {"group": str(GROUP), "scale_unit": str(SCALE_UNIT), "tensors": json.dumps(layout.tensor_shapes)}
    # 1. The layout says where each tensor lies. The order of the adapters in a shard does not depend on the caller's.
    ordered = sorted(adapters, key=lambda adapter: adapter[0])
    tensors: dict[str, TensorInfo] = {}
    for position, (key, _) in enumerate(ordered):
        tensors |= _describe(layout, key, dtype, position * size)
    header = write_header(tensors, described)
    # 2. Each adapter is rounded in its place, so its values are copied once.
    body = torch.empty(len(ordered) * size, dtype=torch.uint8)
    for position, (key, factors) in enumerate(ordered):
        place = body[position * size : (position + 1) * size]
        if dtype == INT8:
            check_factors(layout, factors, key)
            place.copy_(_quantize(layout, factors, key))
        else:
            check_shapes(layout, factors, key)
            stored = _views(layout, place, DTYPES[dtype])
            for name, values in stored.items():
                values.copy_(factors[name])
            check_factors(layout, stored, key)
    data = b"".join((header, body.numpy().data))
    begins = {key: len(header) + position * size for position, (key, _) in enumerate(ordered)}
    view = memoryview(data)
    packed = [
        PackedAdapter(key, begins[key], size, checksum(view[begins[key] : begins[key] + size])) for key, _ in adapters
    ]
    return data, packed


def _describe(layout: LoraLayout, key: str, dtype: str, begin: int) -> dict[str, TensorInfo]:
    """Return the tensors of an adapter whose bytes begin at `begin`, by the names that they have in a shard."""
    if dtype == INT8:
        size = adapter_size_bytes(layout, dtype)
        return {key: TensorInfo("U8", [size], begin, begin + size)}
    tensors = {}
    for name, shape in layout.tensor_shapes.items():
        end = begin + math.prod(shape) * STORED_BYTES[dtype]
        tensors[f"{key}/{name}"] = TensorInfo(_SAFETENSORS_NAMES[dtype], shape, begin, end)
        begin = end
    return tensors


def unpack_adapter(layout: LoraLayout, data: bytes, dtype: str, key: str, expected: str) -> dict[str, Tensor]:
    """Return an adapter's factors from the bytes of its range, which have the checksum `expected`.

    The factors keep the dtype in which they are stored, but int8 becomes float32.

    Raises:
        AdapterError: if the bytes are too few, altered, or do not fit the layout.
        NotFiniteAdapterError: if a value is not finite.
    """
    if checksum(data) != expected:
        raise AdapterError(
            f"adapter {key}: {len(data)} bytes with checksum {checksum(data)}, the ledger says {expected}",
            f"its shard was altered or cut short: {REPAIR}",
        )
    check_length(layout, len(data), dtype, key)
    buffer = bytearray(data)
    stored = torch.frombuffer(buffer, dtype=torch.uint8)
    factors = _dequantize(layout, buffer) if dtype == INT8 else _views(layout, stored, DTYPES[dtype])
    check_factors(layout, factors, key)
    return factors


def _views(layout: LoraLayout, stored: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the bytes of a float adapter `[size]` as its tensors, without a copy."""
    values = stored.view(dtype)
    counts = [math.prod(shape) for shape in layout.tensor_shapes.values()]
    parts = zip(layout.tensor_shapes.items(), values.split_with_sizes(counts), strict=True)
    return {name: part.view(shape) for (name, shape), part in parts}


def _quantize(layout: LoraLayout, factors: Factors, key: str) -> Tensor:
    """Return an adapter's scales (fp16) and values (int8) as one tensor of bytes."""
    scales, values = [], []
    for name, shape in layout.tensor_shapes.items():
        flat = factors[name].float().flatten()
        grouped = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
        scale = (grouped.abs().amax(dim=1) / (127 * SCALE_UNIT)).half()
        if not bool(torch.isfinite(scale).all()):
            raise AdapterError(
                f"adapter {key}: {name} holds values up to {float(flat.abs().max()):.3g}, too large for int8",
                "store it as bfloat16 (storage.adapter_dtype)",
            )
        step = scale.float().unsqueeze(1) * SCALE_UNIT
        # A step so small that fp16 rounds it to 0 stands for values of 0.
        steps = torch.where(step > 0, grouped / step, torch.zeros_like(grouped))
        values.append(steps.round().clamp(-127, 127).to(torch.int8).flatten()[: math.prod(shape)].view(torch.uint8))
        scales.append(scale.view(torch.uint8))
    return torch.cat(scales + values)


def _dequantize(layout: LoraLayout, buffer: bytearray) -> dict[str, Tensor]:
    """Return the float32 factors from the bytes that `_quantize` made."""
    factors = {}
    scale_offset, value_offset = 0, 2 * sum(groups_of(shape) for shape in layout.tensor_shapes.values())
    for name, shape in layout.tensor_shapes.items():
        count, groups = math.prod(shape), groups_of(shape)
        scale = torch.frombuffer(buffer, dtype=torch.float16, count=groups, offset=scale_offset)
        values = torch.frombuffer(buffer, dtype=torch.int8, count=count, offset=value_offset).float()
        steps = (scale.float() * SCALE_UNIT).repeat_interleave(GROUP)[:count]
        factors[name] = (values * steps).view(shape)
        scale_offset += 2 * groups
        value_offset += count
    return factors
