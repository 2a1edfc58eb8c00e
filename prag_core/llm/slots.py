"""The state of a batch whose rows join and leave between tokens: keys and values, and adapters.

Both classes keep the live rows in the first rows of their tensors, in the same order. When a row leaves, the last live
row moves into its slot. A row's unused entries are zero, never a former row's values: a masked value, or one of weight
zero, would still make a sum NaN if it were not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from prag_core.errors import ModelError
from prag_core.llm.lora import AdapterStack, RowAdapters

# Columns are allocated in blocks, so that a batch moves to new tensors at most once in this many tokens.
_BLOCK = 128
# These layers keep nothing but keys and values, all of which stay here; the model masks those outside a window.
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass
class _Extent:
    """The part of a layer's tensors that is in use, and their allocated size.

    In use are the first `rows` rows, and the columns from `first_column` up to `write_position`, where the next token
    goes. Allocated are `height` rows and `width` columns.
    """

    rows: int = 0
    first_column: int = 0
    write_position: int = 0
    height: int = 0
    width: int = 0

    @property
    def length(self) -> int:
        """The number of columns in use."""
        return self.write_position - self.first_column


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, both `[height, heads, width, head dimension]`."""

    def __init__(self, extent: _Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._extent = extent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._extent.height, like.shape[1], self._extent.width, like.shape[3])

    def move(self, end: int) -> None:
        """Copy the columns in use into newly allocated tensors, where they end at column `end`."""
        used = self._extent
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._allocate(old)
            new[: used.rows, :, end - used.length : end] = old[: used.rows, :, used.first_column : used.write_position]
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        used = self._extent
        rows, after = slice(used.rows), used.write_position + 1
        self.keys[rows, :, used.write_position : after] = key_states
        self.values[rows, :, used.write_position : after] = value_states
        return self.keys[rows, :, used.first_column : after], self.values[rows, :, used.first_column : after]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._extent.length

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The keys and values of a batch whose rows join and leave between tokens.

    All rows end at the same column, the write position, so that a step writes one column of each layer for all of them.
    The columns of a row are contiguous, so the model's own causal and sliding-window masks are right, together with the
    mask that says which columns belong to each row.
    """

    def __init__(self, model: Any, slots: int) -> None:
        self._slots = slots
        self._device = model.device
        self._extent = _Extent()
        self._starts: list[int] = []
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self._slot_layers = [_SlotLayer(self._extent) for _ in range(attention_layers(model))]
        super().__init__(layers=[*self._slot_layers])

    def join(self, layers: Sequence[tuple[Tensor, Tensor]], row: int, length: int) -> None:
        """Append a live row.

        Args:
            layers: Keys and values of each layer, `[rows, heads, at least length, head dimension]`; may be empty
                when `length` is 0.
            row: Which of their rows to copy.
            length: How many of their first columns to copy.
        """
        self._make_room(len(self._starts) + 1, length)
        slot, end = len(self._starts), self._extent.write_position
        start = end - length
        for layer, (keys, values) in zip(self._slot_layers, layers, strict=False):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
        for number, layer in enumerate(self._slot_layers):
            if layer.keys is None or layer.values is None:
                continue
            layer.keys[slot, :, :start] = 0
            layer.values[slot, :, :start] = 0
            if length:
                keys, values = layers[number]
                layer.keys[slot, :, start:end] = keys[row, :, :length]
                layer.values[slot, :, start:end] = values[row, :, :length]
        self._mask[slot] = False
        self._mask[slot, start:end] = True
        self._starts.append(start)
        self._measure()

    def leave(self, slot: int) -> None:
        """Remove a live row; the last live row moves into its slot."""
        last, end = len(self._starts) - 1, self._extent.write_position
        if slot != last:
            for layer in self._slot_layers:
                for tensor in (layer.keys, layer.values):
                    if tensor is not None:
                        tensor[slot, :, :end] = tensor[last, :, :end]
            self._mask[slot] = self._mask[last]
        self._starts[slot] = self._starts[last]
        self._starts.pop()
        self._measure()

    def open_column(self) -> Tensor:
        """Make room for one more token of each live row, and return the attention mask `[rows, columns]`, bool.

        Pass the mask and this cache to the forward pass that follows, then call `close_column`.
        """
        self._make_room(len(self._starts), 0)
        used = self._extent
        self._mask[: used.rows, used.write_position] = True
        return self._mask[: used.rows, used.first_column : used.write_position + 1]

    def close_column(self) -> None:
        """Advance the write position after a forward pass."""
        self._extent.write_position += 1

    def _measure(self) -> None:
        self._extent.rows = len(self._starts)
        self._extent.first_column = min(self._starts, default=self._extent.write_position)

    def _make_room(self, rows: int, length: int) -> None:
        """Make room for this many rows, for `length` columns before the write position, and for one after it."""
        used = self._extent
        end = max(length, used.length)
        if end <= used.write_position < used.width and rows <= used.height:
            return
        if rows > used.height:
            used.height = min(self._slots, max(rows, 2 * used.height))
        used.width = (end // _BLOCK + 2) * _BLOCK
        for layer in self._slot_layers:
            if layer.is_initialized:
                layer.move(end)
        mask = torch.zeros(used.height, used.width, dtype=torch.bool, device=self._device)
        mask[: used.rows, end - used.length : end] = self._mask[: used.rows, used.first_column : used.write_position]
        self._mask = mask
        self._starts = [start + end - used.write_position for start in self._starts]
        used.write_position = end
        self._measure()


class SlotAdapters:
    """The adapters of the live rows, in tensors with one row per slot; rows without adapters are zero."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._has_adapters: list[bool] = []
        self._stack: AdapterStack | None = None
        self._live: RowAdapters | None = None

    def join(self, source: AdapterStack | None, row: int) -> None:
        """Append a live row with the adapters of one row of `source`, or with none."""
        slot, rank = len(self._has_adapters), 0
        if source is not None:
            rank = source.weights.shape[1]
            self._widen(source)
        # Overwrite or zero a former row's values: a weight of zero alone would let NaN through.
        if self._stack is not None:
            for target, pair in self._stack.factors.items():
                for side, tensor in enumerate(pair):
                    if source is not None:
                        tensor[:, slot, :rank] = source.factors[target][side][:, row]
                    tensor[:, slot, rank:] = 0
            if source is not None:
                self._stack.weights[slot, :rank] = source.weights[row]
            self._stack.weights[slot, rank:] = 0
        self._has_adapters.append(source is not None)
        self._live = None

    def leave(self, slot: int) -> None:
        """Remove a live row; the last live row moves into its slot."""
        last = len(self._has_adapters) - 1
        if self._stack is not None and slot != last:
            for pair in self._stack.factors.values():
                for tensor in pair:
                    tensor[:, slot] = tensor[:, last]
            self._stack.weights[slot] = self._stack.weights[last]
        self._has_adapters[slot] = self._has_adapters[last]
        self._has_adapters.pop()
        self._live = None

    def rows(self) -> RowAdapters | None:
        """Return the live rows' adapters as views; None when no row has any, so that the bare model runs."""
        if self._stack is None or not any(self._has_adapters):
            return None
        if self._live is None:
            self._live = self._stack.rows(len(self._has_adapters))
        return self._live

    def _widen(self, source: AdapterStack) -> None:
        """Make the tensors at least as wide as the summed rank of `source`, or exactly so when no row has adapters.

        They are kept when the last row with adapters leaves. Of new ones only the live rows are written: the memory of
        the others comes into use when a row joins.
        """
        rank, in_use = source.weights.shape[1], any(self._has_adapters)
        width = 0 if self._stack is None else self._stack.weights.shape[1]
        if width == rank or (in_use and width > rank):
            return
        old = self._stack if in_use else None
        live = len(self._has_adapters)
        factors = {}
        for target, pair in source.factors.items():
            wider = [tensor.new_empty(len(tensor), self._slots, rank, tensor.shape[3]) for tensor in pair]
            for side, tensor in enumerate(wider):
                tensor[:, :live] = 0
                if old is not None:
                    tensor[:, :live, :width] = old.factors[target][side][:, :live]
            factors[target] = (wider[0], wider[1])
        weights = source.weights.new_empty(self._slots, rank)
        weights[:live] = 0
        if old is not None:
            weights[:live, :width] = old.weights[:live]
        self._stack = AdapterStack(source.layers, factors, weights)


def attention_layers(model: Any) -> int:
    """Return the number of a model's layers, all of which must use plain or sliding-window attention.

    Raises:
        ModelError: when a layer keeps anything else than its own keys and values (linear or chunked attention, shared
            keys and values).
    """
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if others := sorted(set(kinds) - _KNOWN_LAYERS):
        raise ModelError(
            f"{type(model).__name__} has layers that the decoder does not support: {', '.join(others)}",
            f"use a model with {' and '.join(sorted(_KNOWN_LAYERS))} layers only",
        )
    return len(kinds)
