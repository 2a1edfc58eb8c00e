"""Adapters with random factors, and stacks of them for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, FlatAdapter, RowAdapters, flatten_adapter, stack_adapters


def random_adapter(layout: LoraLayout, seed: int) -> dict[str, torch.Tensor]:
    """Other random values in each tensor, so that swapped gate, up and down factors would show."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in layout.tensor_shapes.items()}


def random_flat(layout: LoraLayout, seed: int) -> FlatAdapter:
    """The same adapter as `random_adapter`, laid out for the decoder in fp32."""
    return flatten_adapter(layout, random_adapter(layout, seed), dtype=torch.float32)


def stack_rows(layout: LoraLayout, rows: Sequence[Sequence[tuple[Factors, float]]]) -> RowAdapters | None:
    """Stack the (adapter, weight) pairs of each row in fp32, for one forward pass."""
    flat = [
        [(flatten_adapter(layout, factors, dtype=torch.float32), weight) for factors, weight in row] for row in rows
    ]
    stacked = stack_adapters(layout, flat, dtype=torch.float32)
    return stacked.rows() if stacked is not None else None
