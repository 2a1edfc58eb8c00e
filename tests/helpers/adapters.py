"""Adapters with random factors."""

from __future__ import annotations

import torch

from prag_core.llm.layout import LoraLayout


def random_adapter(layout: LoraLayout, seed: int) -> dict[str, torch.Tensor]:
    """Other random values in each tensor, so that swapped gate, up and down factors would show."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in layout.tensor_shapes.items()}
