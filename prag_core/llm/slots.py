"""What a batch holds of each row while rows join and leave between tokens: keys and values, and adapters.

Both keep the live rows as the first rows of their tensors, in the same order; a row that leaves makes place for the
last one. What a row does not own is zero, never a former row's: a value that is masked or has no weight would still
reach the sum if it were not finite.
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

# Columns that are allocated at once; a batch moves to new tensors at most once in so many tokens.
_BLOCK = 128
# Their states are keys and values of their own, all kept here; the model masks those outside a window.
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass
class _Columns:
    """Where in a layer's tensors the live rows are: `rows` first rows, columns `first_column` to `write_position`."""

    rows: int = 0
    first_column: int = 0
    write_position: int = 0
    height: int = 0
    width: int = 0


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, both `[height, heads, width, head dimension]`."""

    def __init__(self, columns: _Columns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._columns.height, like.shape[1], self._columns.width, like.shape[3])

    def move(self, first_column: int, write_position: int, end: int) -> None:
        """Take the live rows' columns `first_column` to `write_position` into new tensors, so that they end at `end`."""
        rows = self._columns.rows
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(old)
            new[:rows, :, end - (write_position - first_column) : end] = old[:rows, :, first_column:write_position]
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        at = self._columns
        self.keys[: at.rows, :, at.write_position : at.write_position + 1] = key_states
        self.values[: at.rows, :, at.write_position : at.write_position + 1] = value_states
        return self.keys[: at.rows, :, at.first_column : at.write_position + 1], self.values[
            : at.rows, :, at.first_column : at.write_position + 1
        ]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns.write_position - self._columns.first_column

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The keys and values of a batch whose rows join and leave between tokens.

    All rows end at the same column, the write_position, so that a step writes one column of each layer for all of them, and
    a row's tokens lie side by side: the model's own causal and sliding-window masks are right as they are, given
    which columns are a row's own.
    """

    def __init__(self, model: Any, slots: int) -> None:
        self._slots = slots
        self._device = model.device
        self._at = _Columns()
        self._starts: list[int] = []
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self._slot_layers = [_SlotLayer(self._at) for _ in range(attention_layers(model))]
        super().__init__(layers=[*self._slot_layers])

    def join(self, layers: Sequence[tuple[Tensor, Tensor]], row: int, length: int) -> None:
        """Append a live row.

        Args:
            layers: Keys and values of each layer, `[rows, heads, at least length, head dimension]`; may be empty
                when `length` is 0.
            row: Which row of them to take.
            length: How many of their first columns are the row's.
        """
        self._fit(len(self._starts) + 1, length)
        place, write_position = len(self._starts), self._at.write_position
        start = write_position - length
        for layer, (keys, values) in zip(self._slot_layers, layers, strict=False):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
        for number, layer in enumerate(self._slot_layers):
            if layer.keys is None or layer.values is None:
                continue
            layer.keys[place, :, :start] = 0
            layer.values[place, :, :start] = 0
            if length:
                keys, values = layers[number]
                layer.keys[place, :, start:write_position] = keys[row, :, :length]
                layer.values[place, :, start:write_position] = values[row, :, :length]
        self._mask[place] = False
        self._mask[place, start:write_position] = True
        self._starts.append(start)
        self._count()

    def leave(self, place: int) -> None:
        """End the live row `place`; the last live row takes its place."""
        last, write_position = len(self._starts) - 1, self._at.write_position
        if place != last:
            for layer in self._slot_layers:
                for tensor in (layer.keys, layer.values):
                    if tensor is not None:
                        tensor[place, :, :write_position] = tensor[last, :, :write_position]
            self._mask[place] = self._mask[last]
        self._starts[place] = self._starts[last]
        self._starts.pop()
        self._count()

    def open_column(self) -> Tensor:
        """Make room for one more token of each live row, and return the attention mask `[rows, columns]`, bool.

        The forward pass that follows gets the mask and this cache; then comes `close_column`.
        """
        self._fit(len(self._starts), 0)
        at = self._at
        self._mask[: at.rows, at.write_position] = True
        return self._mask[: at.rows, at.first_column : at.write_position + 1]

    def close_column(self) -> None:
        """Count the column that the forward pass wrote."""
        self._at.write_position += 1

    def _count(self) -> None:
        self._at.rows = len(self._starts)
        self._at.first_column = min(self._starts, default=self._at.write_position)

    def _fit(self, rows: int, length: int) -> None:
        """Make the tensors hold so many rows, a row of `length` tokens before the write_position, and a column after it."""
        at = self._at
        first_column, write_position = at.first_column, at.write_position
        end = max(length, write_position - first_column)
        if end <= write_position < at.width and rows <= at.height:
            return
        if rows > at.height:
            at.height = min(self._slots, max(rows, 2 * at.height))
        at.width = (end // _BLOCK + 2) * _BLOCK
        for layer in self._slot_layers:
            if layer.is_initialized:
                layer.move(first_column, write_position, end)
        mask = torch.zeros(at.height, at.width, dtype=torch.bool, device=self._device)
        mask[: at.rows, end - (write_position - first_column) : end] = self._mask[
            : at.rows, first_column:write_position
        ]
        self._mask = mask
        self._starts = [start + end - write_position for start in self._starts]
        at.write_position = end
        self._count()


class SlotAdapters:
    """The adapters of the live rows, in tensors of a row a slot: laid there when a row joins, zero for none."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._has: list[bool] = []
        self._stack: AdapterStack | None = None
        self._view: RowAdapters | None = None

    def join(self, source: AdapterStack | None, row: int) -> None:
        """Append a live row with the adapters of one row of `source`, or with none."""
        place, rank = len(self._has), 0
        if source is not None:
            rank = source.weights.shape[1]
            self._widen(source)
        # What a former row left is overwritten or set to zero: a weight of zero alone would let NaN through.
        if self._stack is not None:
            for target, pair in self._stack.factors.items():
                for side, tensor in enumerate(pair):
                    if source is not None:
                        tensor[:, place, :rank] = source.factors[target][side][:, row]
                    tensor[:, place, rank:] = 0
            if source is not None:
                self._stack.weights[place, :rank] = source.weights[row]
            self._stack.weights[place, rank:] = 0
        self._has.append(source is not None)
        self._view = None

    def leave(self, place: int) -> None:
        """End the live row `place`; the last live row takes its place."""
        last = len(self._has) - 1
        if self._stack is not None and place != last:
            for pair in self._stack.factors.values():
                for tensor in pair:
                    tensor[:, place] = tensor[:, last]
            self._stack.weights[place] = self._stack.weights[last]
        self._has[place] = self._has[last]
        self._has.pop()
        self._view = None

    def rows(self) -> RowAdapters | None:
        """Return the live rows' adapters, or None when none has any: the bare model then runs as it is."""
        if self._stack is None or not any(self._has):
            return None
        if self._view is None:
            self._view = self._stack.rows(len(self._has))
        return self._view

    def _widen(self, source: AdapterStack) -> None:
        """Make the tensors hold a summed rank like that of `source`; where no row has adapters, that rank alone.

        Tensors for all slots take longer to make than an adapter to lay into one, so they stay when the last row that
        has adapters leaves.
        """
        rank, in_use = source.weights.shape[1], any(self._has)
        width = 0 if self._stack is None else self._stack.weights.shape[1]
        if width == rank or (in_use and width > rank):
            return
        old = self._stack if in_use else None
        factors = {}
        for target, pair in source.factors.items():
            wider = [tensor.new_zeros(len(tensor), self._slots, rank, tensor.shape[3]) for tensor in pair]
            if old is not None:
                for tensor, former in zip(wider, old.factors[target], strict=True):
                    tensor[:, :, : old.weights.shape[1]] = former
            factors[target] = (wider[0], wider[1])
        weights = source.weights.new_zeros(self._slots, rank)
        if old is not None:
            weights[:, : old.weights.shape[1]] = old.weights
        self._stack = AdapterStack(source.layers, factors, weights)


def attention_layers(model: Any) -> int:
    """Return the number of a model's layers, each of which must be plain or sliding-window attention.

    Raises:
        ModelError: when a layer keeps other states than keys and values of its own (linear or chunked attention,
            shared keys and values).
    """
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if others := sorted(set(kinds) - _KNOWN_LAYERS):
        raise ModelError(
            f"{type(model).__name__} has layers that decoding in slots does not know: {', '.join(others)}",
            f"use a model all of whose layers are {' or '.join(sorted(_KNOWN_LAYERS))}",
        )
    return len(kinds)
