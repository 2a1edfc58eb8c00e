"""Continuous batching: sequences join and leave the batch between tokens, each with its own adapters.

A step reads a chunk of the waiting prompts and generates one token for each running row. A row's result depends on its
own request alone: its neighbours change nothing but the rounding.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import torch

from prag_core.errors import ModelError, PromptTooLongError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import Decoded, DecodeEvent, DecodeFinish, DecodeRequest
from prag_core.llm.lora import Injector
from prag_core.llm.prefill import Prefill, PromptGroup, Row, use_adapters
from prag_core.llm.prefix_cache import PrefixCache, cache_layers
from prag_core.llm.sampling import NO_TOKEN, make_sampler, pick_tokens
from prag_core.llm.slots import SlotAdapters, SlotCache

# The first bytes of a character whose last ones are beyond the limit: decoded together or each alone.
_CUT_OFF = re.compile("\ufffd{1,3}\\Z")


class Decoder:
    """Continues sequences in a fixed number of slots; a step costs only what its running rows need.

    `submit` requests at any time, call `step` while `busy`, and read each request's tokens and result from the events;
    or `run` some requests to their end. Use it from one thread.

    Args:
        base: The frozen model. Its layers use plain or sliding-window attention.
        injector: Adds adapters to the model, in the layout of the requests' adapters; None when no request has any.
        slots: The most rows that decode together.
        prefill_chunk: The most prompt tokens, padding included, that are read between two decoding steps.
        max_tokens: The most tokens in all slots together: prompts, new tokens and padding. A longer request runs
            alone. It bounds memory.

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
        """Drop all requests without events. Call it after `step` has raised an error."""
        self._prefill = Prefill(
            self._base, self._injector, slots=self._slots, chunk=self._prefill_chunk, max_tokens=self._max_tokens
        )
        self._live: list[Row] = []
        self._cache = SlotCache(self._base.model, self._slots)
        self._adapters = SlotAdapters(self._slots)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self._prefill.busy or bool(self._live)

    @property
    def running(self) -> int:
        """The number of slots in use, by rows whose prompts are being read or that decode."""
        return len(self._live) + len(self._prefill.reading)

    def check(self, request: DecodeRequest) -> None:
        """Check that a request can be served.

        Raises:
            PromptTooLongError: when the prompt and its new tokens exceed the model's context.
            ModelError: when it has adapters, but the decoder has no injector.
        """
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise PromptTooLongError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones exceed the context "
                f"of {self.context}",
                "split the passage (corpus.max_words), or use a model with a longer context",
            )
        if request.adapters and self._injector is None:
            raise ModelError("a request has adapters, but the model has no hooks for them", "pass an Injector")

    def submit(self, request: DecodeRequest) -> int:
        """Queue a request, and return the id of its events. It raises what `check` raises."""
        self.check(request)
        prefix, shared = (None, 0) if request.adapters else self.prefixes.match(request.prompt[:-1])
        sampler = make_sampler(
            request.prompt,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        )
        row = Row(next(self._ids), request, prefix, shared, sampler, time.perf_counter())
        self._prefill.add(row)
        return row.id

    def cancel(self, id: int) -> bool:
        """Drop a request without an event; returns False when it has already ended."""
        for slot, row in enumerate(self._live):
            if row.id == id:
                with torch.inference_mode():
                    self._leave(slot)
                return True
        return self._prefill.cancel(id)

    def step(self) -> list[DecodeEvent]:
        """Read up to `prefill_chunk` tokens of waiting prompts, then generate one token for each running row."""
        with torch.inference_mode():
            self._prefill.start(self._live)
            group = self._prefill.step()
            if group is not None:
                self._join(group)
            return self._decode() if self._live else []

    def run(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Return the result of each request, in order.

        Raises:
            RuntimeError: when the decoder is busy.
            PromptTooLongError, ModelError: see `check`; nothing has run then.
        """
        if self.busy:
            raise RuntimeError("run: the decoder is busy with requests whose events would be lost")
        results: dict[int, Decoded] = {}
        indices: dict[int, int] = {}
        try:
            # The longest first: prompts of similar length are read together, and the batch ends with short rows.
            lengths = [(-len(request.prompt), -request.max_new_tokens) for request in requests]
            for index in sorted(range(len(requests)), key=lengths.__getitem__):
                indices[self.submit(requests[index])] = index
            while self.busy:
                for event in self.step():
                    if event.result is not None:
                        results[indices[event.id]] = event.result
        except BaseException:
            self.reset()
            raise
        return [results[index] for index in range(len(requests))]

    def _join(self, group: PromptGroup) -> None:
        """Put prompts that have been read into slots; the first decoding step reads the last token of each."""
        layers = cache_layers(group.cache)
        for i, row in enumerate(group.rows):
            if not row.cancelled:
                self._cache.join(layers, i, row.prefill_length)
                begun = time.perf_counter()
                self._adapters.join(group.adapters if row.request.adapters else None, i)
                row.inject_s += time.perf_counter() - begun
                self._live.append(row)

    def _leave(self, slot: int) -> None:
        """Free the slot of a live row; the last live row moves into it."""
        self._cache.leave(slot)
        self._adapters.leave(slot)
        self._live[slot] = self._live[-1]
        self._live.pop()

    def _decode(self) -> list[DecodeEvent]:
        """Generate one token for each live row; rows that end leave at once."""
        rows = self._live
        # 1. One forward pass for all rows, each with its own keys, values and adapters.
        last = [[row.tokens[-1] if row.tokens else row.prompt[-1]] for row in rows]
        positions = [[row.prefill_length + len(row.tokens)] for row in rows]
        mask = self._cache.open_column()
        with use_adapters(self._injector, self._adapters.rows()):
            output = self._base.model(
                input_ids=torch.tensor(last, device=self._device),
                attention_mask=mask,
                position_ids=torch.tensor(positions, device=self._device),
                cache=self._cache,
                use_cache=True,
            )
        self._cache.close_column()
        # 2. Pick a token for each row. A row ends at a stop token, at a stop string or at its limit.
        tokens = pick_tokens(output.logits[:, -1], [row.sampler for row in rows])
        now = time.perf_counter()
        events = []
        ended = []
        for slot, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.first_token_at = row.first_token_at or now
            if token == NO_TOKEN or token in row.request.stop_ids:
                finish: DecodeFinish = "not_finite" if token == NO_TOKEN else "stop"
                events.append(DecodeEvent(row.id, None, self._result(row, finish, now)))
                ended.append(slot)
                continue
            row.tokens.append(token)
            result = None
            if self._has_stopped(row):
                result = self._result(row, "stop", now)
            elif len(row.tokens) == row.request.max_new_tokens:
                result = self._result(row, "length", now)
            if result is not None:
                ended.append(slot)
            events.append(DecodeEvent(row.id, token, result))
        # 3. Free the last slot first, so that only rows that go on move into a freed slot.
        for slot in reversed(ended):
            self._leave(slot)
        return events

    def _has_stopped(self, row: Row) -> bool:
        stops = (*row.request.stop_strings, *(("\n",) if row.request.one_line else ()))
        if not stops:
            return False
        # A token has at least one byte. A few more tokens, since a tokenizer may decode the first one differently.
        window = max(len(stop.encode()) for stop in stops) + 8
        text = self._base.tokenizer.decode(row.tokens[-window:], skip_special_tokens=True)
        if not any(stop in text for stop in stops):
            return False
        whole: str = self._base.tokenizer.decode(row.tokens, skip_special_tokens=True)
        return row.request.until_stop(whole) != whole

    def _result(self, row: Row, finish: DecodeFinish, now: float) -> Decoded:
        text = self._base.tokenizer.decode(row.tokens, skip_special_tokens=True)
        text = row.request.until_stop(text)
        # A character of several tokens that the limit cuts off is no character.
        text = _CUT_OFF.sub("", text) if finish == "length" else text
        return Decoded(
            tokens=row.tokens,
            text=text,
            finish=finish,
            wait_ms=(row.joined_at - row.submitted_at) * 1e3,
            inject_ms=row.inject_s * 1e3,
            prefill_ms=(row.first_token_at - row.joined_at - row.inject_s) * 1e3,
            decode_ms=(now - row.first_token_at) * 1e3,
        )


def context_length(config: Any) -> int:
    """Return the most tokens that a sequence may have, given a model's transformers configuration.

    With `longrope`, one row beyond the original context would change the rotary frequencies of the whole batch, so the
    original context is the limit.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit
