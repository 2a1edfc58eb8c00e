"""Layers as training computes them: the same values and gradients, with less kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import Injector, RowAdapters
from prag_core.recipe import RECIPES
from prag_core.testing import FAMILIES, tiny_base_model
from prag_core.training.layers import Packing, TrainingLayers, causal_attention

RECIPE = RECIPES["recall"]
IDS = torch.arange(3, 83).reshape(4, 20)


def random_rows(layout: object, count: int) -> RowAdapters:
    """Return adapters of `count` rows as training has them: leaf factors, with the scale in B."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer in layout.layers:
        for target in layout.targets:
            inputs, outputs = layout.tensor_shapes[f"{target}.A"][2], layout.tensor_shapes[f"{target}.B"][1]
            factors[layer, target] = tuple(
                (0.1 * torch.randn(count, layout.rank, size, generator=generator)).requires_grad_()
                for size in (inputs, outputs)
            )
    return RowAdapters(factors, None)


def run(model: torch.nn.Module, active: Callable, rows: RowAdapters) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Return the hidden states, the gradients of all factors, and the bytes that were kept for the backward pass."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights and torch._C._current_graph_task_id() == -1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [leaf for pair in rows.factors.values() for leaf in pair]
    with active(rows), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
        # Not the sum of squares, which the last norm makes constant.
        gradients = torch.autograd.grad((hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum(), leaves)
    return hidden.detach(), list(gradients), sum(kept.values())


@pytest.mark.parametrize("rows", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_model_s_own_layers(tmp_path: Path, family: str, rows: int) -> None:
    model = tiny_base_model(tmp_path, family=family).model
    injector = Injector(model, RECIPE)
    adapters = random_rows(injector.layout, rows)
    expected, gradients, kept = run(model, injector.active, adapters)
    layers = TrainingLayers(model, injector)
    found, same, less = run(model, layers.active, adapters)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    for left, right in zip(same, gradients, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()
    # Phi-3's fused gate and up stay as they are; Gemma's norms do too, and keep more than the others'.
    assert less <= {"phi3": 1.0, "gemma2": 0.9, "gemma3": 0.9}.get(family, 0.8) * kept
    # Without active rows, and when it is closed, the model has its own code.
    bare = model(input_ids=IDS).logits
    layers.close()
    assert torch.equal(model(input_ids=IDS).logits, bare)
    injector.close()


# Layers whose gate and up are one module, capped scores.
PADDED = {"phi3", "gemma2"}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_values_and_gradients_of_padded_ones(tmp_path: Path, family: str, copies: int) -> None:
    model = tiny_base_model(tmp_path, family=family).model
    injector = Injector(model, RECIPE)
    layers = TrainingLayers(model, injector)
    assert layers.can_pack == (family not in PADDED)
    if not layers.can_pack:
        return
    adapters, lengths = random_rows(injector.layout, 4 // copies), [20, 7, 13, 1]
    places = [torch.arange(length) for length in lengths]
    packing = Packing(4, 20, torch.cat([place + 20 * row for row, place in enumerate(places)]))
    leaves = [leaf for pair in adapters.factors.values() for leaf in pair]
    weights = torch.linspace(-1, 1, model.config.hidden_size)
    found = []
    for packed in (False, True):
        with layers.active(adapters, packing if packed else None):
            ids, at = (packing.pack(IDS)[None], torch.cat(places)[None]) if packed else (IDS, None)
            hidden = model.get_decoder()(input_ids=ids, position_ids=at, use_cache=False).last_hidden_state
        hidden = hidden[0] if packed else packing.pack(hidden)
        found.append((hidden.detach(), torch.autograd.grad((hidden * weights).sum(), leaves)))
    (padded, expected), (packed, gradients) = found
    assert torch.allclose(packed, padded, rtol=1e-4, atol=1e-4)
    for left, right in zip(gradients, expected, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()
    assert torch.equal(packing.pack(packing.pad(packed)), packed)


def test_a_layer_with_other_code_stays_as_it_is(tiny: BaseModel) -> None:
    mlp = tiny.model.model.layers[1].mlp

    class Doubled(type(mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    injector = Injector(tiny.model, RECIPE)
    adapters = random_rows(injector.layout, 4)
    expected, gradients, _ = run(tiny.model, injector.active, adapters)
    layers = TrainingLayers(tiny.model, injector)
    assert "forward" not in mlp.__dict__
    assert not layers.can_pack
    assert "forward" in tiny.model.model.layers[0].mlp.__dict__
    found, same, _ = run(tiny.model, layers.active, adapters)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all((left - right).norm() <= 1e-4 * right.norm() for left, right in zip(same, gradients, strict=True))


def test_a_recomputed_layer_has_the_same_adapters_in_another_thread(tiny: BaseModel) -> None:
    injector = Injector(tiny.model, RECIPE)
    layers = TrainingLayers(tiny.model, injector)
    with torch.no_grad():
        with layers.active(random_rows(injector.layout, 4)):
            expected = tiny.model(input_ids=IDS).logits
            _, again = layers.recompute_contexts()
        assert not torch.allclose(tiny.model(input_ids=IDS).logits, expected)

    @torch.no_grad()
    def recompute() -> torch.Tensor:
        with again:
            return tiny.model(input_ids=IDS).logits

    with ThreadPoolExecutor(1) as other:  # autograd computes again in a thread of its own
        assert torch.equal(other.submit(recompute).result(), expected)


@pytest.mark.parametrize("window", [None, 8])
def test_attention_in_bf16_is_that_in_fp32_within_rounding(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 24, 16, generator=generator) for heads in (6, 2, 2))
    mask = torch.ones(24, 24, dtype=torch.bool).tril().triu(1 - (window or 24))
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        inputs = [tensor.to(dtype) for tensor in (query, key, value)]
        found, _ = causal_attention(module, *inputs, None, scaling=0.3, sliding_window=window, dropout=0.0)
        assert torch.allclose(found.float(), expected.transpose(1, 2), atol=tolerance)
