"""The layout of an adapter: the modules of the base model that it changes, its shapes, and its size in bytes.

Importing this loads no torch, which takes seconds: a run's driver and Ray's tasks need an adapter's layout only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prag_core.errors import AdapterError, ModelError
from prag_core.recipe import TrainRecipe

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Target → the module that some models have in place of two targets.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}

# Float dtype in which adapters can be stored → bytes per value.
STORED_BYTES = {"float32": 4, "bfloat16": 2}
# int8: each tensor is flattened and cut into groups of 64 values. A value is q · s · 2^-14, with q in -127 … 127 and an
# fp16 scale s for its group. Without the factor, the scales of a barely trained B would be too small for fp16.
INT8 = "int8"
GROUP = 64
SCALE_UNIT = 2.0**-14


@dataclass(frozen=True)
class LoraLayout:
    """The modules that an adapter changes, `layers` × `targets`, and the (inputs, outputs) of each target in `shapes`.

    An adapter maps `<target>.A` to a tensor `[layers, rank, inputs]` and `<target>.B` to a tensor
    `[layers, outputs, rank]`. Both are unscaled: B·A is multiplied by `scale` (alpha / rank) where it is used.
    """

    rank: int
    scale: float
    layers: tuple[int, ...]
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The shape of each tensor of an adapter, by name, sorted by name."""
        shapes = {}
        for target, (inputs, outputs) in sorted(zip(self.targets, self.shapes, strict=True)):
            shapes[f"{target}.A"] = (len(self.layers), self.rank, inputs)
            shapes[f"{target}.B"] = (len(self.layers), outputs, self.rank)
        return shapes

    @property
    def parameters(self) -> int:
        """The number of values in one adapter."""
        return sum(math.prod(shape) for shape in self.tensor_shapes.values())


def place_of(name: str) -> tuple[int, str] | None:
    """Return the layer and the last part of a module's name; None for a module outside the numbered layers."""
    match = _LAYER.search(name)
    return (int(match.group(1)), name.rsplit(".", 1)[-1]) if match else None


def find_layout(linear: Mapping[str, tuple[int, int]], recipe: TrainRecipe) -> LoraLayout:
    """Return the layout of a recipe's adapters for a model.

    Where a model computes gate and up in one module (Phi-3), that module is adapted in place of the two.

    Args:
        linear: The (inputs, outputs) of each linear module of the model, by its name.
        recipe: Names the targets, the rank and the layers.

    Raises:
        ModelError: when a target is missing in a layer, is no linear module, or differs in shape between layers, or
            when the model has fewer layers than wanted. Otherwise an adapter could match no module without a sign.
    """
    by_place: dict[tuple[int, str], tuple[int, int]] = {}
    repeated = set()
    for name, shape in linear.items():
        place = place_of(name)
        if place is None:
            continue
        if place in by_place:
            repeated.add(place[1])
        by_place[place] = shape
    names = {leaf for _, leaf in by_place}
    targets = tuple(dict.fromkeys(_FUSED.get(t, t) if t not in names else t for t in recipe.targets))
    if repeated.intersection(targets):
        raise ModelError(
            f"the base model has several modules {', '.join(sorted(repeated.intersection(targets)))} in one layer",
            "choose a model with one feed-forward network per layer (no mixture of experts, no second tower)",
        )
    layers = tuple(sorted({layer for layer, _ in by_place}))
    missing = [t for t in targets if any((layer, t) not in by_place for layer in layers or [0])]
    if missing:
        wanted = [t for t in recipe.targets if t in missing or _FUSED.get(t) in missing]
        raise ModelError(
            f"the base model has no linear module {', '.join(wanted)} in some layer; it has {sorted(names)}",
            "choose a model with gated feed-forward layers, or other targets in the recipe",
        )
    if recipe.last_layers is not None:
        if recipe.last_layers > len(layers):
            raise ModelError(
                f"train.last_layers = {recipe.last_layers}, but the base model has {len(layers)} layers",
                "lower train.last_layers",
            )
        layers = layers[-recipe.last_layers :]
    shapes = []
    for target in targets:
        found = {by_place[layer, target] for layer in layers}
        if len(found) > 1:
            raise ModelError(f"{target} differs in shape between layers: {sorted(found)}", "choose another model")
        shapes.append(found.pop())
    return LoraLayout(recipe.rank, recipe.scale, layers, targets, tuple(shapes))


def module_names(linear: Iterable[str], layout: LoraLayout) -> dict[tuple[int, str], str]:
    """Return the full name of each module that a layout adapts, by (layer, target).

    `linear` are the names of the linear modules of the model that the layout was made for.
    """
    names = {place: name for name in linear if (place := place_of(name)) is not None}
    return {(layer, target): names[layer, target] for target in layout.targets for layer in layout.layers}


def adapter_size_bytes(layout: LoraLayout, dtype: str) -> int:
    """Return the size of one adapter in a shard.

    Raises:
        AdapterError: when adapters cannot be stored in this dtype.
    """
    check_dtype(dtype)
    if dtype == INT8:
        return layout.parameters + 2 * sum(groups_of(shape) for shape in layout.tensor_shapes.values())
    return layout.parameters * STORED_BYTES[dtype]


def check_length(layout: LoraLayout, size_bytes: int, dtype: str, key: str) -> None:
    """Check that an adapter of `size_bytes` bytes can be one of this layout.

    Raises:
        AdapterError: when it cannot, or adapters cannot be stored in this dtype.
    """
    wanted = adapter_size_bytes(layout, dtype)
    if size_bytes != wanted:
        raise AdapterError(f"adapter {key}: {size_bytes} bytes, as {dtype} the layout wants {wanted}")


def check_dtype(dtype: str) -> None:
    """Check that adapters can be stored in this dtype.

    Raises:
        AdapterError: when they cannot.
    """
    if dtype != INT8 and dtype not in STORED_BYTES:
        raise AdapterError(
            f"adapters cannot be stored as {dtype!r}", f"choose one of {', '.join([*STORED_BYTES, INT8])}"
        )


def groups_of(shape: Sequence[int]) -> int:
    """Return the number of int8 groups, each with a scale, of a tensor of this shape."""
    return -(-math.prod(shape) // GROUP)
