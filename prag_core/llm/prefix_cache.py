"""Prefixes that many prompts share (an instruction), each computed once by the bare model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Shorter prefixes are not worth a forward pass of their own.
_SHORTEST_PREFIX = 32
# How many prefixes are kept: those used most recently.
_KEPT_PREFIXES = 4


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix's tokens, with the bare model's keys and values `[1, heads, tokens, head dimension]` of each layer."""

    ids: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def cache(self, length: int, rows: int) -> DynamicCache:
        """Return a cache with `rows` rows, each of which holds the first `length` tokens."""
        return DynamicCache(
            [
                (keys[:, :, :length].expand(rows, -1, -1, -1), values[:, :, :length].expand(rows, -1, -1, -1))
                for keys, values in self.layers
            ]
        )


class PrefixCache:
    """The prefixes that were used most recently.

    Rows with adapters must not use them: hidden states depend on the adapters, and these are the bare model's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Without the head: a prefix needs no logits.
        self._decoder = model.get_decoder()
        self._kept: list[Prefix] = []

    def share(self, prompts: Sequence[list[int]]) -> None:
        """Compute the prefix that all of `prompts` share, unless it is short or a known one lacks few of its tokens."""
        if not prompts:
            return
        first, last = min(prompts), max(prompts)
        ids = first[: common_length(first, last)]
        known, length = self.match(ids)
        if known is not None:
            self._kept.remove(known)
            self._kept.append(known)
        if len(prompts) == 1 or len(ids) - length < _SHORTEST_PREFIX:
            return
        cache = known.cache(length, 1) if known is not None else DynamicCache()
        with torch.inference_mode():
            rest = torch.tensor([ids[length:]], device=self._model.device)
            positions = torch.arange(length, len(ids), device=self._model.device)[None]
            self._decoder(input_ids=rest, position_ids=positions, cache=cache, use_cache=True)
        # Prefixes of the new prefix are no longer needed.
        self._kept = [prefix for prefix in self._kept if prefix.ids != ids[: len(prefix.ids)]]
        self._kept.append(Prefix(ids, cache_layers(cache)))
        del self._kept[:-_KEPT_PREFIXES]

    def match(self, ids: Sequence[int]) -> tuple[Prefix | None, int]:
        """Return the known prefix with which `ids` share the most tokens, and how many; None and 0 when too few."""
        best, length = None, _SHORTEST_PREFIX - 1
        for prefix in self._kept:
            common = common_length(prefix.ids, ids)
            if common > length:
                best, length = prefix, common
        return (best, length) if best is not None else (None, 0)


def cache_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return the (keys, values) of each layer of a cache."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layers.append((layer.keys, layer.values))
    return layers


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
