"""The shape of an adapter: which modules of a base model it is for, and the bytes that it takes.

Nothing here needs torch, whose import takes seconds: a run's driver and Ray's tasks know adapters by their shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prag_core.errors import AdapterError, ModelError
from prag_core.recipe import TrainRecipe

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Where a model computes two targets in one module, that module's name.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}

# The types in which adapters can be stored, by the bytes of a value.
STORED_BYTES = {"float32": 4, "bfloat16": 2}
# int8: each tensor is flattened and cut into groups of 64 values; a group's values are q · s, with q in -127 … 127
# and one fp16 s in units of 2^-14. Without the unit the small values of a barely trained B would fall below fp16.
INT8 = "int8"
GROUP = 64
SCALE_UNIT = 2.0**-14


@dataclass(frozen=True)
class LoraLayout:
    """The shapes of an adapter for one base model: `layers` × `targets`, each with (inputs, outputs).

    An adapter is a mapping of `<target>.A` to a tensor `[layers, rank, inputs]` and of `<target>.B` to a tensor
    `[layers, outputs, rank]`, unscaled. `scale` (alpha / rank) multiplies B·A wherever it is used, and only there.
    """

    rank: int
    scale: float
    layers: tuple[int, ...]
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return the shape of each tensor of an adapter, by name, in sorted order."""
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
    """Return the layer and the last part of a module's name; None for one that lies in no numbered layer."""
    match = _LAYER.search(name)
    return (int(match.group(1)), name.rsplit(".", 1)[-1]) if match else None


def find_layout(linear: Mapping[str, tuple[int, int]], recipe: TrainRecipe) -> LoraLayout:
    """Return the layout of a recipe's adapters for a model whose linear modules have these (inputs, outputs), by name.

    A model that computes gate and up in one module (Phi-3) has that module adapted in place of the two.

    Raises:
        ModelError: when a target is missing in a layer, is no linear layer, or differs in shape between layers,
            or when the model has fewer layers than wanted. An adapter that matches nothing would be silent
            otherwise.
    """
    placed: dict[tuple[int, str], tuple[int, int]] = {}
    several = set()
    for name, shape in linear.items():
        place = place_of(name)
        if place is None:
            continue
        if place in placed:
            several.add(place[1])
        placed[place] = shape
    names = {leaf for _, leaf in placed}
    targets = tuple(dict.fromkeys(_FUSED.get(t, t) if t not in names else t for t in recipe.targets))
    if several.intersection(targets):
        raise ModelError(
            f"the base model has several modules {', '.join(sorted(several.intersection(targets)))} in one layer",
            "choose a model with one feed-forward network a layer (no mixture of experts, no second tower)",
        )
    layers = tuple(sorted({layer for layer, _ in placed}))
    missing = [t for t in targets if any((layer, t) not in placed for layer in layers or [0])]
    if missing:
        wanted = [t for t in recipe.targets if t in missing or _FUSED.get(t) in missing]
        raise ModelError(
            f"the base model has no linear module {', '.join(wanted)} in each layer; it has {sorted(names)}",
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
        found = {placed[layer, target] for layer in layers}
        if len(found) > 1:
            raise ModelError(f"{target} has other shapes in other layers: {sorted(found)}", "choose another model")
        shapes.append(found.pop())
    return LoraLayout(recipe.rank, recipe.scale, layers, targets, tuple(shapes))


def adapter_size_bytes(layout: LoraLayout, dtype: str) -> int:
    """Return the bytes that one adapter takes in a shard.

    Raises:
        AdapterError: when there is no such storage dtype.
    """
    check_dtype(dtype)
    if dtype == INT8:
        return layout.parameters + 2 * sum(groups_of(shape) for shape in layout.tensor_shapes.values())
    return layout.parameters * STORED_BYTES[dtype]


def check_dtype(dtype: str) -> None:
    """Check that adapters can be stored in this type.

    Raises:
        AdapterError: when they cannot.
    """
    if dtype != INT8 and dtype not in STORED_BYTES:
        raise AdapterError(f"adapters cannot be stored as {dtype!r}", f"known are {', '.join([*STORED_BYTES, INT8])}")


def groups_of(shape: Sequence[int]) -> int:
    """Return how many groups, each with a scale, a tensor of this shape is cut into as int8."""
    return -(-math.prod(shape) // GROUP)
