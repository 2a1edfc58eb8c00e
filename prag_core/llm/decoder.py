"""Continuous batching: sequences join and leave between tokens, each with its own adapters.

A step reads a piece of the waiting prompts and makes one token for every row that is under way. A row's result
depends on its own request alone: on its neighbours only by the rounding of the dtype.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from prag_core.errors import ModelError, PromptTooLongError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import AdapterStack, Factors, Injector, RowAdapters, stack_adapters
from prag_core.llm.prefix_cache import Prefix, PrefixCache, cache_layers
from prag_core.llm.sampling import NO_TOKEN, Sampler, make_sampler, pick_tokens
from prag_core.llm.slots import SlotAdapters, SlotCache

# So many of the waiting prompts are looked at when some of like lengths are sought.
_LOOK_AHEAD = 64
# Prompts read together may be padded up to so many tokens in all, or else by a quarter of what they hold.
_CHEAP_TOKENS = 64
Finish = Literal["stop", "length", "not_finite"]


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt to continue, and how.

    Args:
        prompt: Its token ids; at least one.
        max_new_tokens: The most tokens to add; at least one.
        stop_ids: Tokens that end it, and are not part of it.
        stop_strings: Texts that end it; its own text ends before the first of them.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw among so many likeliest tokens; 0 stands for all.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: With the prompt it decides what is drawn.
        adapters: The adapters whose weighted sum is added to the model, with their weights.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    adapters: Sequence[tuple[Factors, float]] = ()

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(f"{len(self.prompt)} tokens to continue by {self.max_new_tokens}: both must be positive")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: out of range")


@dataclass(frozen=True)
class Decoded:
    """What became of a request.

    `finish` is `stop` (a stop token or string), `length`, or `not_finite`: its logits were not, and it ended there.
    `text` has no special tokens and ends before a stop string, `tokens` are all that were made. Milliseconds:
    `wait_ms` for a slot, `inject_ms` to gather the adapters and lay them into the slot, `prefill_ms` for the rest of
    the way to the first token, `decode_ms` from there to the last; other rows' work in the same steps is part of them.
    """

    tokens: list[int]
    text: str
    finish: Finish
    wait_ms: float
    inject_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class DecodeEvent:
    """One step of one request: its new token (None when it has none), and its result when it has ended."""

    id: int
    token: int | None
    result: Decoded | None = None


@dataclass(eq=False)
class _Row:
    """A request under way."""

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
        return self.request.prompt

    @property
    def to_read(self) -> int:
        """The tokens to read before the last one of the prompt, which the first step of decoding reads."""
        return len(self.prompt) - 1

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.request.max_new_tokens


@dataclass(eq=False)
class _Reading:
    """Prompts that are read together: padded on the right to `ids` `[rows, width]`, after a shared prefix."""

    rows: list[_Row]
    shared: int
    ids: Tensor
    adapters: AdapterStack | None
    active: RowAdapters | None
    cache: DynamicCache
    done: int = 0


class Decoder:
    """Continues sequences in a fixed number of slots. One thread drives it; it is as light as its running rows.

    `submit` requests at any time, call `step` while `busy`, and take each request's tokens and result from the
    events; or `run` some requests to their end.

    Args:
        base: The frozen model. Its layers are plain or sliding-window attention.
        injector: Its hooks, whose layout fits the requests' adapters; None when no request has any.
        slots: The most rows that decode together.
        prefill_chunk: The most prompt tokens, padding included, that a step reads before the running rows go on.
        max_tokens: The most tokens, padded, prompts and new ones together, that the slots may hold; a request
            beyond it runs alone. It bounds memory.

    Raises:
        ModelError: when the model has layers of another kind.
    """

    def __init__(
        self,
        base: BaseModel,
        injector: Injector | None = None,
        *,
        slots: int = 16,
        prefill_chunk: int = 512,
        max_tokens: int | None = None,
    ) -> None:
        self.context = context_length(base.model.config)
        self.prefixes = PrefixCache(base.model)
        self._base = base
        self._device = base.device
        self._injector = injector
        self._slots = slots
        self._prefill_chunk = prefill_chunk
        self._max_tokens = max_tokens
        self._ids = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Drop all requests, without events. It is what to do after `step` has raised an error."""
        self._waiting: dict[int, _Row] = {}
        self._readings: deque[_Reading] = deque()
        self._live: list[_Row] = []
        self._cache = SlotCache(self._base.model, self._slots)
        self._adapters = SlotAdapters(self._slots)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._readings or self._live)

    @property
    def running(self) -> int:
        """The slots in use: requests whose prompts are read or that decode."""
        return len(self._live) + sum(len(reading.rows) for reading in self._readings)

    def check(self, request: DecodeRequest) -> None:
        """Check that a request can be served.

        Raises:
            PromptTooLongError: when the prompt and the tokens it asks for exceed the model's context.
            ModelError: when it has adapters and the decoder no injector.
        """
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise PromptTooLongError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones exceed the context "
                f"of {self.context}",
                "split the passage (corpus.max_words), or use a model with a longer context",
            )
        if request.adapters and self._injector is None:
            raise ModelError("a request has adapters, and the model has no hooks for them", "give an Injector")

    def submit(self, request: DecodeRequest) -> int:
        """Queue a request, and return the id that its events carry. It raises what `check` raises."""
        self.check(request)
        prefix, shared = (None, 0) if request.adapters else self.prefixes.match(request.prompt[:-1])
        sampler = make_sampler(
            request.prompt,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        )
        row = _Row(next(self._ids), request, prefix, shared, sampler, time.perf_counter())
        self._waiting[row.id] = row
        return row.id

    def cancel(self, id: int) -> bool:
        """Drop a request, without an event; False when it has ended already."""
        if self._waiting.pop(id, None) is not None:
            return True
        for place, row in enumerate(self._live):
            if row.id == id:
                with torch.inference_mode():
                    self._leave(place)
                return True
        for reading in self._readings:
            for row in reading.rows:
                if row.id == id and not row.cancelled:
                    # What is read with it goes on; it will not join.
                    row.cancelled = True
                    if all(other.cancelled for other in reading.rows):
                        self._readings.remove(reading)
                    return True
        return False

    def step(self) -> list[DecodeEvent]:
        """Read up to `prefill_chunk` tokens of waiting prompts, then make one token for each running row."""
        with torch.inference_mode():
            self._take()
            # Long prompts take turns, so that a short one waits for no more than a piece of each.
            if self._readings:
                reading = self._readings.popleft()
                if self._read(reading):
                    self._join(reading)
                else:
                    self._readings.append(reading)
            return self._decode() if self._live else []

    def run(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Return the result of each request, in order. The decoder must not be busy.

        Raises:
            PromptTooLongError, ModelError: as `check`, before anything runs.
        """
        if self.busy:
            raise RuntimeError("run: the decoder is busy with requests whose events would be lost")
        results: dict[int, Decoded] = {}
        places: dict[int, int] = {}
        try:
            # The longest first: like lengths are read together, and short rows are left for the end.
            lengths = [(-len(request.prompt), -request.max_new_tokens) for request in requests]
            for place in sorted(range(len(requests)), key=lengths.__getitem__):
                places[self.submit(requests[place])] = place
            while self.busy:
                for event in self.step():
                    if event.result is not None:
                        results[places[event.id]] = event.result
        except BaseException:
            self.reset()
            raise
        return [results[place] for place in range(len(requests))]

    def _take(self) -> None:
        """Begin to read the prompt that waits longest, and others of like length with it, as far as slots are free."""
        busy = [*self._live, *(row for reading in self._readings for row in reading.rows)]
        free = self._slots - len(busy)
        if not self._waiting or free == 0:
            return
        chosen: list[_Row] = []
        for row in itertools.islice(self._waiting.values(), _LOOK_AHEAD):
            trial = [*chosen, row]
            if chosen and not _alike(trial, self._prefill_chunk):
                continue
            tokens = (len(busy) + len(trial)) * max(row.max_length for row in [*busy, *trial])
            if self._max_tokens and tokens > self._max_tokens and len(busy) + len(trial) > 1:
                break
            chosen = trial
            if len(chosen) == free:
                break
        if not chosen:
            return
        for row in chosen:
            del self._waiting[row.id]
            row.joined_at = time.perf_counter()
        adapters = active = None
        if self._injector is not None:
            sums = [row.request.adapters for row in chosen]
            model = self._base.model
            adapters = stack_adapters(self._injector.layout, sums, dtype=model.dtype, device=self._device)
            active = adapters.rows() if adapters is not None else None
        for row in chosen:
            row.inject_s = time.perf_counter() - row.joined_at
        shared = min(row.shared for row in chosen)
        ids = padded([row.prompt[shared : row.to_read] for row in chosen]).to(self._device)
        prefix = chosen[0].prefix
        cache = prefix.cache(shared, len(chosen)) if prefix is not None else DynamicCache()
        self._readings.append(_Reading(chosen, shared, ids, adapters, active, cache))

    def _read(self, reading: _Reading) -> bool:
        """Read the next columns of some prompts, and say whether they have been read."""
        width = reading.ids.shape[1]
        end = min(width, reading.done + max(1, self._prefill_chunk // len(reading.rows)))
        if reading.done < end:
            positions = torch.arange(reading.shared + reading.done, reading.shared + end, device=self._device)
            with self._active(reading.active):
                self._base.model(
                    input_ids=reading.ids[:, reading.done : end],
                    position_ids=positions[None],
                    cache=reading.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            reading.done = end
        return end == width

    def _join(self, reading: _Reading) -> None:
        """Put prompts that have been read into slots; the last token of each is the first to decode."""
        layers = cache_layers(reading.cache)
        for i, row in enumerate(reading.rows):
            if not row.cancelled:
                self._cache.join(layers, i, row.to_read)
                begun = time.perf_counter()
                self._adapters.join(reading.adapters if row.request.adapters else None, i)
                row.inject_s += time.perf_counter() - begun
                self._live.append(row)

    def _leave(self, place: int) -> None:
        """Free the slot of a live row; the last one takes its place."""
        self._cache.leave(place)
        self._adapters.leave(place)
        self._live[place] = self._live[-1]
        self._live.pop()

    def _decode(self) -> list[DecodeEvent]:
        """Make one token for each live row; rows that end leave at once."""
        rows = self._live
        # 1. One forward pass for all of them, each with its own keys, values and adapters.
        last = [[row.tokens[-1] if row.tokens else row.prompt[-1]] for row in rows]
        positions = [[row.to_read + len(row.tokens)] for row in rows]
        mask = self._cache.open_column()
        with self._active(self._adapters.rows()):
            output = self._base.model(
                input_ids=torch.tensor(last, device=self._device),
                attention_mask=mask,
                position_ids=torch.tensor(positions, device=self._device),
                cache=self._cache,
                use_cache=True,
            )
        self._cache.close_column()
        # 2. Their tokens; a row ends at a stop token, at a stop string or at its limit.
        tokens = pick_tokens(output.logits[:, -1], [row.sampler for row in rows])
        now = time.perf_counter()
        events = []
        ended = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.first_token_at = row.first_token_at or now
            if token == NO_TOKEN or token in row.request.stop_ids:
                finish: Finish = "not_finite" if token == NO_TOKEN else "stop"
                events.append(DecodeEvent(row.id, None, self._result(row, finish, now)))
                ended.append(place)
                continue
            row.tokens.append(token)
            result = None
            if self._has_stop_string(row):
                result = self._result(row, "stop", now)
            elif len(row.tokens) == row.request.max_new_tokens:
                result = self._result(row, "length", now)
            if result is not None:
                ended.append(place)
            events.append(DecodeEvent(row.id, token, result))
        # 3. The last place first: what moves into a freed place is a row that goes on.
        for place in reversed(ended):
            self._leave(place)
        return events

    def _active(self, rows: RowAdapters | None) -> contextlib.AbstractContextManager[None]:
        return self._injector.active(rows) if self._injector is not None else contextlib.nullcontext()

    def _has_stop_string(self, row: _Row) -> bool:
        stops = row.request.stop_strings
        if not stops:
            return False
        # A token has a byte at least; some more, since a tokenizer may treat the first one of a text otherwise.
        window = max(len(stop.encode()) for stop in stops) + 8
        text = self._base.tokenizer.decode(row.tokens[-window:])
        return any(stop in text for stop in stops)

    def _result(self, row: _Row, finish: Finish, now: float) -> Decoded:
        text = self._base.tokenizer.decode(row.tokens, skip_special_tokens=True)
        for stop in row.request.stop_strings:
            text = text.split(stop)[0]
        return Decoded(
            tokens=row.tokens,
            text=text,
            finish=finish,
            wait_ms=(row.joined_at - row.submitted_at) * 1e3,
            inject_ms=row.inject_s * 1e3,
            prefill_ms=(row.first_token_at - row.joined_at - row.inject_s) * 1e3,
            decode_ms=(now - row.first_token_at) * 1e3,
        )


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return token ids `[rows, longest]`, int64, padded on the right.

    Causal attention looks back: without a mask, the padding reaches no token of a row.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


def context_length(config: Any) -> int:
    """Return how many tokens a sequence may have.

    A model that turns to other rotary frequencies for the whole batch when one row is long (`longrope`) would make
    rows depend on their neighbours: it is used up to that length.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def _alike(rows: Sequence[_Row], most: int) -> bool:
    """Say whether to read prompts together: behind the same prefix, within `most` tokens, with little padding."""
    if rows[-1].prefix is not rows[0].prefix:
        return False
    shared = min(row.shared for row in rows)
    padded = len(rows) * (max(row.to_read for row in rows) - shared)
    tokens = sum(row.to_read - row.shared for row in rows)
    return padded <= most and padded <= max(_CHEAP_TOKENS, tokens * 5 // 4)
