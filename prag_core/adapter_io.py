"""Adapters as bytes: many in one safetensors shard, one by its byte range, and as a PEFT folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from prag_core.errors import AdapterError
from prag_core.identity import checksum
from prag_core.lora import Factors, LoraLayout, check_factors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placed:
    """Where one adapter lies in a shard: byte offset and length, and the checksum of those bytes."""

    key: str
    offset: int
    length: int
    checksum: str


def pack_shard(
    layout: LoraLayout, adapters: Sequence[tuple[str, Factors]], dtype: str, metadata: Mapping[str, str]
) -> tuple[bytes, list[Placed]]:
    """Return the bytes of a shard and where each adapter lies in it.

    Each adapter is a few stacked tensors `<key>/<target>.A` `[layers, rank, inputs]` and `<key>/<target>.B`
    `[layers, outputs, rank]`, side by side, so that one ranged read fetches it. `metadata` goes into the header.

    Raises:
        AdapterError: when an adapter does not fit the layout or holds values that are not finite.
    """
    tensors = {}
    for key, factors in adapters:
        stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in factors.items()}
        check_factors(layout, stored, key)
        tensors.update({f"{key}/{name}": tensor.contiguous() for name, tensor in stored.items()})
    data = safetensors.torch.save(tensors, dict(metadata))
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    placed = []
    for key, _ in adapters:
        ranges = [header[f"{key}/{name}"]["data_offsets"] for name in layout.tensor_shapes]
        # safetensors lays tensors of one type in the order of their names, which is the layout's order.
        if any(left[1] != right[0] for left, right in itertools.pairwise(ranges)):
            raise AdapterError(f"adapter {key}: its tensors do not lie side by side in the shard")
        begin, end = 8 + header_size + ranges[0][0], 8 + header_size + ranges[-1][1]
        placed.append(Placed(key, begin, end - begin, checksum(memoryview(data)[begin:end])))
    return data, placed


def unpack_adapter(layout: LoraLayout, data: bytes, dtype: str, key: str, expected: str) -> dict[str, Tensor]:
    """Return an adapter's factors from the bytes of its range.

    Raises:
        AdapterError: when the bytes are too few, altered (`expected` is their checksum) or do not fit the layout.
    """
    if checksum(data) != expected:
        raise AdapterError(
            f"adapter {key}: {len(data)} bytes with checksum {checksum(data)}, the ledger says {expected}",
            "its shard was altered or cut short; the adapter must be made again",
        )
    factors = {}
    offset = 0
    buffer = bytearray(data)
    for name, shape in layout.tensor_shapes.items():
        count = shape[0] * shape[1] * shape[2]
        size = count * DTYPES[dtype].itemsize
        if offset + size > len(buffer):
            raise AdapterError(f"adapter {key}: {len(buffer)} bytes are too few for the layout")
        factors[name] = torch.frombuffer(buffer, dtype=DTYPES[dtype], count=count, offset=offset).view(shape)
        offset += size
    if offset != len(buffer):
        raise AdapterError(f"adapter {key}: {len(buffer)} bytes, the layout wants {offset}")
    check_factors(layout, factors, key)
    return factors


def export_peft(layout: LoraLayout, factors: Factors, folder: Path, base_model: str) -> None:
    """Write an adapter as a PEFT folder, which `PeftModel.from_pretrained` loads onto the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for target in layout.targets:
        for position, layer in enumerate(layout.layers):
            prefix = f"base_model.model.model.layers.{layer}.mlp.{target}"
            tensors[f"{prefix}.lora_A.weight"] = factors[f"{target}.A"][position].float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = factors[f"{target}.B"][position].float().contiguous()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": layout.rank,
        "lora_alpha": layout.scale * layout.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layout.targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
