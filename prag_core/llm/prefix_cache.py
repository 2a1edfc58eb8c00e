"""Beginnings that many prompts share (an instruction, worked examples), each read once by the bare model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Fewer common tokens than this are not worth a forward pass of their own.
_SHORTEST_PREFIX = 32
# Beginnings that are kept, the last used ones.
_KEPT_PREFIXES = 4


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of some prompts, with the bare model's keys and values `[1, heads, tokens, head dimension]`."""

    ids: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def cache(self, length: int, rows: int) -> DynamicCache:
        """Return a cache of `rows` rows that each hold the first `length` tokens."""
        return DynamicCache(
            [
                (keys[:, :, :length].expand(rows, -1, -1, -1), values[:, :, :length].expand(rows, -1, -1, -1))
                for keys, values in self.layers
            ]
        )


class PrefixCache:
    """The last used beginnings that many prompts share (an instruction, worked examples), each computed once.

    They are the bare model's: hidden states depend on the adapters, so rows with adapters must not use them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: list[Prefix] = []

    def share(self, prompts: Sequence[list[int]]) -> tuple[Prefix | None, int]:
        """Compute what all of `prompts` begin with, unless it is short, and return it as `match` does.

        A known prefix that lacks only a few of the common tokens will do.
        """
        if not prompts:
            return None, 0
        first, last = min(prompts), max(prompts)
        ids = first[: _common(first, last)]
        known, length = self.match(ids)
        if known is not None:
            self._kept.remove(known)
            self._kept.append(known)
        if len(prompts) == 1 or len(ids) - length < _SHORTEST_PREFIX:
            return known, length
        cache = known.cache(length, 1) if known is not None else DynamicCache()
        with torch.inference_mode():
            rest = torch.tensor([ids[length:]], device=self._model.device)
            positions = torch.arange(length, len(ids), device=self._model.device)[None]
            self._model(input_ids=rest, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
        # What the new one begins with is needed no more.
        self._kept = [prefix for prefix in self._kept if prefix.ids != ids[: len(prefix.ids)]]
        self._kept.append(Prefix(ids, cache_layers(cache)))
        del self._kept[:-_KEPT_PREFIXES]
        return self._kept[-1], len(ids)

    def match(self, ids: Sequence[int]) -> tuple[Prefix | None, int]:
        """Return the known prefix that `ids` share most tokens with, and how many; None and 0 when it is few."""
        best, length = None, _SHORTEST_PREFIX - 1
        for prefix in self._kept:
            common = _common(prefix.ids, ids)
            if common > length:
                best, length = prefix, common
        return (best, length) if best is not None else (None, 0)


def cache_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a cache."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layers.append((layer.keys, layer.values))
    return layers


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
