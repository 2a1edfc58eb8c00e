"""LoRA adapters in a forward pass: each row of a batch has adapters of its own, and the model stays unchanged.

For row i and one adapted module, `y = W x + B_i (w_i ⊙ (A_i x))`: two batched products. In training, `A_i` and `B_i`
hold one adapter. In answering they hold several side by side, since a sum of adapters is exactly one adapter of the
summed rank: `Σ_j w_j B_j A_j = [B_1 … B_k] diag(w) [A_1; …; A_k]`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prag_core.errors import AdapterError, NotFiniteAdapterError
from prag_core.llm.layout import LoraLayout, find_layout, place_of
from prag_core.recipe import TrainRecipe

Factors = Mapping[str, Tensor]
# An adapter as `flatten_adapter` lays it out.
FlatAdapter = Tensor
# Smaller values of B change no output, and as int8 they are stored as zero.
LEAST_B = 1e-9


def find_targets(model: Any, recipe: TrainRecipe) -> tuple[LoraLayout, dict[tuple[int, str], nn.Linear]]:
    """Return the layout of a recipe's adapters for `model`, and the modules to adapt by (layer, target).

    Raises:
        ModelError: when the model does not fit the recipe; see `prag_core.llm.layout.find_layout`.
    """
    layout = find_layout(linear_shapes(model), recipe)
    modules = {}
    for name, module in model.named_modules():
        place = place_of(name)
        if isinstance(module, nn.Linear) and place and place[0] in layout.layers and place[1] in layout.targets:
            modules[place] = module
    return layout, modules


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Return the (inputs, outputs) of each linear module of a model, by its name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def merge_adapter(model: Any, recipe: TrainRecipe, factors: Factors) -> None:
    """Add an adapter to a model's own weights, for good: what all requests need costs nothing afterwards.

    The sum is made in fp32 and rounded to the dtype of the weights.

    Raises:
        AdapterError: when the adapter does not fit the model.
        ModelError: when the model does not fit the recipe; see `prag_core.llm.layout.find_layout`.
    """
    layout, modules = find_targets(model, recipe)
    check_factors(layout, factors, "the adapter to merge")
    for (layer, target), module in modules.items():
        position, weight = layout.layers.index(layer), module.weight.detach()
        a, b = (factors[f"{target}.{name}"][position].to(weight.device, torch.float32) for name in "AB")
        changed = (weight.float() + layout.scale * (b @ a)).to(weight.dtype)
        module.weight = nn.Parameter(changed, requires_grad=False)


def changes_nothing(factors: Factors) -> bool:
    """Return whether an adapter is without effect: each value of its B is zero, or would be zero when it is stored."""
    return all(float(factor.abs().max()) < LEAST_B for name, factor in factors.items() if name.endswith(".B"))


def initial_factors(layout: LoraLayout, seed: int) -> dict[str, Tensor]:
    """Return the fp32 factors that all adapters of a recipe start from: A Kaiming-uniform as in PEFT, B zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in layout.tensor_shapes.items():
        factors[name] = torch.zeros(shape)
        if name.endswith(".A"):
            bound = 1 / math.sqrt(shape[-1])  # kaiming_uniform_ with a = √5
            factors[name].uniform_(-bound, bound, generator=generator)
    return factors


def check_factors(layout: LoraLayout, factors: Factors, key: str) -> None:
    """Check that an adapter has each tensor of the layout, in the right shape, and that all values are finite.

    Raises:
        AdapterError: names the adapter and the first tensor that does not fit.
        NotFiniteAdapterError: names the adapter and the first tensor that is not finite.
    """
    check_shapes(layout, factors, key)
    for name in layout.tensor_shapes:
        # If any value is not finite, an extreme is not. In bf16 `aminmax` is ten times faster than `isfinite` on all
        # values, which took most of the time of fetching an adapter.
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(factors[name])):
            raise NotFiniteAdapterError(f"adapter {key}: {name} holds values that are not finite")


def check_shapes(layout: LoraLayout, factors: Factors, key: str) -> None:
    """Check that an adapter has each tensor of the layout, in the right shape.

    Raises:
        AdapterError: names the adapter and the first tensor that does not fit.
    """
    expected = layout.tensor_shapes
    if set(factors) != set(expected):
        raise AdapterError(f"adapter {key}: has tensors {sorted(factors)}, the layout wants {sorted(expected)}")
    for name, shape in expected.items():
        if tuple(factors[name].shape) != shape:
            raise AdapterError(
                f"adapter {key}: {name} has shape {tuple(factors[name].shape)}, the layout wants {shape}"
            )


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of each of R rows, for one forward pass; q is the summed rank of a row.

    `factors` maps (layer, target) to A `[R, q, inputs]` and the transpose of B `[R, q, outputs]`. A batch of n · R rows
    is n rows for each of these, one after the other. B is transposed
    because with few tokens per row, adding q long rows is ten times faster than q short products per output.
    `weights` `[R, q]` is each adapter's weight times the layout's scale. In training it is None: there each adapter has
    the same, which is multiplied into B once a step.
    """

    factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    weights: Tensor | None


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of each of R rows with all layers in one tensor, so that few copies move a row.

    `factors` maps each target to A `[layers, R, q, inputs]` and the transpose of B `[layers, R, q, outputs]`;
    `weights` is `[R, q]`, as in `RowAdapters`.
    """

    layers: tuple[int, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    weights: Tensor

    def rows(self, count: int | None = None) -> RowAdapters:
        """Return views of the first `count` rows, by default of all."""
        views = {
            (layer, target): (a[position, :count], b[position, :count])
            for target, (a, b) in self.factors.items()
            for position, layer in enumerate(self.layers)
        }
        return RowAdapters(views, self.weights[:count])


def flatten_adapter(
    layout: LoraLayout, factors: Factors, *, dtype: torch.dtype, page_locked: bool = False
) -> FlatAdapter:
    """Lay an adapter out for a forward pass, as one tensor of `layout.parameters` values on the CPU.

    For each target it holds A `[layers, rank, inputs]` and then the transpose of B `[layers, rank, outputs]`. Do it
    once, where an adapter is loaded: transposing takes most of the time of adding an adapter to a row.

    Args:
        layout: The layout that the factors have.
        factors: The adapter.
        dtype: The dtype of the model.
        page_locked: Whether to use page-locked memory, from which a GPU copies without waiting.
    """
    flat = torch.empty(layout.parameters, dtype=dtype, pin_memory=page_locked)
    for target, (a, b) in _unflatten(layout, flat).items():
        a.copy_(factors[f"{target}.A"])
        b.copy_(factors[f"{target}.B"].transpose(1, 2))
    return flat


def _unflatten(layout: LoraLayout, flat: FlatAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return views of each target's A `[layers, rank, inputs]` and transposed B `[layers, rank, outputs]`."""
    shape = (len(layout.layers), layout.rank, -1)
    sizes = [shape[0] * shape[1] * size for pair in layout.shapes for size in pair]
    blocks = [block.view(shape) for block in torch.split(flat, sizes)]
    return dict(zip(layout.targets, zip(blocks[::2], blocks[1::2], strict=True), strict=True))


def stack_adapters(
    layout: LoraLayout,
    rows: Sequence[Sequence[tuple[FlatAdapter, float]]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> AdapterStack | None:
    """Stack the (adapter, weight) pairs of each row side by side; rows with fewer adapters are filled with zeros.

    Returns None when no row has an adapter, so that the bare model runs.
    """
    most = max((len(row) for row in rows), default=0)
    if most == 0:
        return None
    weights = torch.zeros(len(rows), most * layout.rank)
    for i, row in enumerate(rows):
        for j, (_, weight) in enumerate(row):
            weights[i, j * layout.rank : (j + 1) * layout.rank] = weight * layout.scale
    shape = (len(layout.layers), len(rows), most * layout.rank)
    factors = {
        target: (
            torch.empty(*shape, inputs, dtype=dtype, device=device),
            torch.empty(*shape, outputs, dtype=dtype, device=device),
        )
        for target, (inputs, outputs) in zip(layout.targets, layout.shapes, strict=True)
    }
    for i, row in enumerate(rows):
        for j, (adapter, _) in enumerate(row):
            # One transfer for each adapter; it is taken apart on the device.
            blocks = _unflatten(layout, adapter.to(device, non_blocking=True))
            for target, pair in factors.items():
                for tensor, block in zip(pair, blocks[target], strict=True):
                    tensor[:, i, j * layout.rank : (j + 1) * layout.rank] = block
        for pair in factors.values():
            for tensor in pair:
                tensor[:, i, len(row) * layout.rank :] = 0
    return AdapterStack(layout.layers, factors, weights.to(device=device, dtype=dtype))


class Injector:
    """Adds the active rows' adapters to the outputs of a model's adapted modules.

    The hooks are registered once and hold no adapter. `active` sets the adapters for the calling thread or task alone;
    outside of it the model runs without adapters.
    """

    def __init__(self, model: Any, recipe: TrainRecipe) -> None:
        self.layout, modules = find_targets(model, recipe)
        self._active: contextvars.ContextVar[RowAdapters | None] = contextvars.ContextVar("active", default=None)
        self._handles = [
            module.register_forward_hook(self._hook(place), prepend=True) for place, module in modules.items()
        ]

    @property
    def rows(self) -> RowAdapters | None:
        """The rows that are active in the calling thread or task."""
        return self._active.get()

    @contextlib.contextmanager
    def active(self, rows: RowAdapters | None) -> Iterator[None]:
        """Use these rows' adapters in the forward passes within this context; they need the same number of rows."""
        token = self._active.set(rows)
        try:
            yield
        finally:
            self._active.reset(token)

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, place: tuple[int, str]) -> Any:
        def add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = self._active.get()
            if rows is None:
                return None
            a, b = rows.factors[place]
            # Rows with the same adapter are one long row: `[n · R, T, inputs]` → `[R, n · T, inputs]`.
            x = inputs[0].reshape(len(a), -1, inputs[0].shape[-1])
            low_rank = torch.bmm(x, a.to(x.dtype).transpose(1, 2))
            if rows.weights is not None:
                low_rank = low_rank * rows.weights[:, None, :].to(x.dtype)
            return torch.baddbmm(output.reshape(len(a), -1, output.shape[-1]), low_rank, b.to(x.dtype)).view_as(output)

        return add_low_rank


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter: fp32 factors on the CPU, and statistics of its training.

    `factors` is None when training failed, and `failure` is then `loss_not_finite`, `out_of_memory` (even with no other
    passage in the stack), `nothing_learned` (the factors are as before) or `equals_another` (those of another adapter,
    so they hold nothing of their own). `first_loss` and `last_loss` are means over the first and the last epoch.
    """

    key: str
    factors: dict[str, Tensor] | None = field(repr=False)
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    failure: str = ""
