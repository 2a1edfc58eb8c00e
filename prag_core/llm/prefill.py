"""Reading prompts before they decode: several of similar length at once, and a long one in chunks."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import DecodeRequest
from prag_core.llm.lora import AdapterStack, Injector, RowAdapters, stack_adapters
from prag_core.llm.prefix_cache import Prefix
from prag_core.llm.sampling import Sampler

# How many waiting prompts are searched for some of similar length.
_LOOK_AHEAD = 64
# Prompts that are read together may have this many tokens, padding included, however much of that is padding.
_CHEAP_TOKENS = 64


@dataclass(eq=False)
class Row:
    """A request with its progress; while it decodes, it is one row of the batch.

    Times are in seconds of `time.perf_counter`. The first `shared` tokens of the prompt are those of `prefix`.
    """

    id: int
    request: DecodeRequest
    prefix: Prefix | None
    shared: int
    sampler: Sampler | None
    submitted_at: float
    joined_at: float = 0.0
    inject_s: float = 0.0
    first_token_at: float = 0.0
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's token ids."""
        return self.request.prompt

    @property
    def prefill_length(self) -> int:
        """The number of tokens to read before decoding; the first decoding step reads the prompt's last token."""
        return len(self.prompt) - 1

    @property
    def max_length(self) -> int:
        """The most tokens that the row can have, prompt included."""
        return len(self.prompt) + self.request.max_new_tokens


@dataclass(eq=False)
class PromptGroup:
    """Prompts that are read together, after the first `shared` tokens, which come from a prefix.

    `ids` `[rows, width]` are their other tokens, padded on the right; the first `done` columns have been read.
    """

    rows: list[Row]
    shared: int
    ids: Tensor
    adapters: AdapterStack | None
    cache: DynamicCache
    done: int = 0


class Prefill:
    """The prompts that wait for a slot, and those that are being read; for the arguments see `Decoder`."""

    def __init__(
        self, base: BaseModel, injector: Injector | None, *, slots: int, chunk: int, max_tokens: int | None
    ) -> None:
        self._base = base
        self._device = base.device
        self._injector = injector
        self._slots = slots
        self._chunk = chunk
        self._max_tokens = max_tokens
        self._waiting: dict[int, Row] = {}
        self._groups: deque[PromptGroup] = deque()

    @property
    def busy(self) -> bool:
        """Whether a prompt waits or is being read."""
        return bool(self._waiting or self._groups)

    @property
    def reading(self) -> list[Row]:
        """The rows that have a slot and whose prompts are being read."""
        return [row for group in self._groups for row in group.rows]

    def add(self, row: Row) -> None:
        """Queue a row."""
        self._waiting[row.id] = row

    def cancel(self, id: int) -> bool:
        """Drop a row; returns False when it is not here."""
        if self._waiting.pop(id, None) is not None:
            return True
        for group in self._groups:
            for row in group.rows:
                if row.id == id and not row.cancelled:
                    # The other prompts of its group are read on.
                    row.cancelled = True
                    if all(other.cancelled for other in group.rows):
                        self._groups.remove(group)
                    return True
        return False

    def start(self, decoding: Sequence[Row]) -> None:
        """Give the free slots to the row that has waited longest and to others with prompts of similar length."""
        busy = [*decoding, *self.reading]
        free = self._slots - len(busy)
        if not self._waiting or free == 0:
            return
        chosen: list[Row] = []
        for row in itertools.islice(self._waiting.values(), _LOOK_AHEAD):
            trial = [*chosen, row]
            if chosen and not _fit_together(trial, self._chunk):
                continue
            tokens = (len(busy) + len(trial)) * max(row.max_length for row in [*busy, *trial])
            if self._max_tokens and tokens > self._max_tokens and len(busy) + len(trial) > 1:
                break
            chosen = trial
            if len(chosen) == free:
                break
        if chosen:
            for row in chosen:
                del self._waiting[row.id]
            self._groups.append(self._make_group(chosen))

    def step(self) -> PromptGroup | None:
        """Read one chunk of one group; returns the group when its prompts have been read.

        Groups take turns, so that a short prompt waits for no more than one chunk of each longer one.
        """
        if not self._groups:
            return None
        group = self._groups.popleft()
        width = group.ids.shape[1]
        end = min(width, group.done + max(1, self._chunk // len(group.rows)))
        if group.done < end:
            positions = torch.arange(group.shared + group.done, group.shared + end, device=self._device)
            with use_adapters(self._injector, group.adapters.rows() if group.adapters else None):
                # Without the head: the logits of a prompt's last token come from the first decoding step.
                self._base.model.get_decoder()(
                    input_ids=group.ids[:, group.done : end],
                    position_ids=positions[None],
                    cache=group.cache,
                    use_cache=True,
                )
            group.done = end
        if end == width:
            return group
        self._groups.append(group)
        return None

    def _make_group(self, rows: list[Row]) -> PromptGroup:
        for row in rows:
            row.joined_at = time.perf_counter()
        adapters = None
        if self._injector is not None:
            sums = [row.request.adapters for row in rows]
            dtype = self._base.model.dtype
            adapters = stack_adapters(self._injector.layout, sums, dtype=dtype, device=self._device)
        for row in rows:
            row.inject_s = time.perf_counter() - row.joined_at
        shared = min(row.shared for row in rows)
        ids = _pad_right([row.prompt[shared : row.prefill_length] for row in rows]).to(self._device)
        prefix = rows[0].prefix
        cache = prefix.cache(shared, len(rows)) if prefix is not None else DynamicCache()
        return PromptGroup(rows, shared, ids, adapters, cache)


@contextlib.contextmanager
def use_adapters(injector: Injector | None, rows: RowAdapters | None) -> Iterator[None]:
    """Make the rows' adapters active in this context; without an injector there are none."""
    with injector.active(rows) if injector is not None else contextlib.nullcontext():
        yield


def _pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return token ids as an int64 tensor `[rows, longest]`, padded on the right.

    Causal attention needs no mask for it: a token never attends to the padding behind it.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


def _fit_together(rows: Sequence[Row], max_tokens: int) -> bool:
    """Return whether to read these prompts together: same prefix, at most `max_tokens` tokens, little padding."""
    if rows[-1].prefix is not rows[0].prefix:
        return False
    shared = min(row.shared for row in rows)
    padded = len(rows) * (max(row.prefill_length for row in rows) - shared)
    tokens = sum(row.prefill_length - row.shared for row in rows)
    return padded <= max_tokens and padded <= max(_CHEAP_TOKENS, tokens * 5 // 4)
