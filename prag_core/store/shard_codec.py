"""Adapters as bytes: many are packed into one safetensors shard, and one is unpacked from its byte range."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
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
    check_dtype,
    groups_of,
)
from prag_core.llm.lora import Factors, check_factors
from prag_core.llm.safetensors_header import read_header

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORED_BYTES}


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
    check_dtype(dtype)
    tensors: dict[str, Tensor] = {}
    described = {**metadata, "dtype": dtype}
    if dtype == INT8:
        described |= {"group": str(GROUP), "scale_unit": str(SCALE_UNIT), "tensors": json.dumps(layout.tensor_shapes)}
    for key, factors in adapters:
        check_factors(layout, factors, key)
        if dtype == INT8:
            tensors[key] = _quantize(layout, factors, key)
        else:
            stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in factors.items()}
            check_factors(layout, stored, key)
            tensors.update({f"{key}/{name}": tensor.contiguous() for name, tensor in stored.items()})
    data = safetensors.torch.save(tensors, described)
    header = read_header(lambda begin, end: data[begin:end])
    packed = []
    for key, _ in adapters:
        names = [key] if dtype == INT8 else [f"{key}/{name}" for name in layout.tensor_shapes]
        stored_tensors = [header.tensors[name] for name in names]
        # safetensors sorts tensors of one dtype by name, and so does the layout.
        if any(left.end != right.begin for left, right in itertools.pairwise(stored_tensors)):
            raise AdapterError(f"adapter {key}: its tensors do not lie side by side in the shard")
        begin, end = stored_tensors[0].begin, stored_tensors[-1].end
        packed.append(PackedAdapter(key, begin, end - begin, checksum(memoryview(data)[begin:end])))
    return data, packed


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
    if len(data) != adapter_size_bytes(layout, dtype):
        raise AdapterError(
            f"adapter {key}: {len(data)} bytes, as {dtype} the layout wants {adapter_size_bytes(layout, dtype)}"
        )
    buffer = bytearray(data)
    factors = _dequantize(layout, buffer) if dtype == INT8 else _views(layout, buffer, DTYPES[dtype])
    check_factors(layout, factors, key)
    return factors


def _views(layout: LoraLayout, buffer: bytearray, dtype: torch.dtype) -> dict[str, Tensor]:
    factors = {}
    offset = 0
    for name, shape in layout.tensor_shapes.items():
        count = math.prod(shape)
        factors[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
        offset += count * dtype.itemsize
    return factors


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
