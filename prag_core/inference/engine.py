"""Retrieve, update, generate: answers questions from a snapshot, each with its own sum of adapters.

A request's adapters are arguments of its forward passes (`prag_core.llm.lora`), so one batch can mix modes, passages
and numbers of passages, and no request leaves a trace. The engine serves one caller at a time; for many users see
`prag_core.inference.service`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from prag_core.config import Config
from prag_core.errors import AdapterError, GenerationError
from prag_core.inference.loaded_snapshot import open_snapshot
from prag_core.inference.processor import Found, PreparedRequest, RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.decode_request import Decoded
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import FlatAdapter, Injector, flatten_adapter
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe
from prag_core.records import Answer
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot


class AdapterSource(Protocol):
    """Finds a passage's adapter by the passage's key."""

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the verified factors.

        Raises:
            AdapterError: when they are missing or damaged.
        """
        ...


class Engine:
    """Answers questions in batches, for one caller.

    Args:
        base: The frozen base model.
        recipe: The recipe of the adapters, which decides their layout and scale.
        processor: Retrieves passages and writes prompts.
        adapters: Finds adapters by key.
        batch_size: How many questions are decoded together.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: TrainRecipe,
        processor: RequestProcessor,
        adapters: AdapterSource,
        *,
        batch_size: int = 16,
    ) -> None:
        self.base = base
        self._injector = Injector(base.model, recipe)
        self._adapters = adapters
        self._batch_size = batch_size
        self._processor = processor

    def answer(self, request: Request) -> Answer:
        """Answer one question; see `answer_batch`.

        Raises:
            PromptTooLongError: when the question with its passages exceeds the model's context.
            NotFiniteError: when the model's output is not finite.
        """
        answers = self._answer_all([self._processor.search(request)])
        if isinstance(answers[0], GenerationError):
            raise answers[0]
        return answers[0]

    def answer_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer questions together, and return the answers in order.

        A passage whose adapter is missing or damaged goes into the prompt instead, and the answer says so. If the sum
        of a question's adapters is too large for the model, all its passages go into the prompt. A question that cannot
        be answered (too long for the model's context, refused by its chat template, or output that is not finite) gets
        an empty answer with `finish` = `error` and the reason in `error`; the others are unaffected. An answer's
        milliseconds include work for other questions in the same steps.
        """
        found = [self._processor.search(request) for request in requests]
        return [
            self._processor.failed(item, answer) if isinstance(answer, GenerationError) else answer
            for item, answer in zip(found, self._answer_all(found), strict=True)
        ]

    def close(self) -> None:
        """Remove the hooks from the base model."""
        self._injector.close()

    def _answer_all(self, found: Sequence[Found]) -> list[Answer | GenerationError]:
        prepared = [self._prepare(item) for item in found]
        decoded = self._decode(prepared)
        # Adapters whose sum is too large fall back to the prompt, as missing ones do.
        for i, result in enumerate(decoded):
            item = prepared[i]
            if isinstance(result, Decoded) and isinstance(item, PreparedRequest) and item.overflowed(result):
                prepared[i] = self._processor.without_adapters(item)
                decoded[i] = self._decode([prepared[i]])[0]
        answers: list[Answer | GenerationError] = []
        for item, result in zip(prepared, decoded, strict=True):
            try:
                if isinstance(item, GenerationError):
                    answers.append(item)
                elif isinstance(result, GenerationError):
                    answers.append(result)
                else:
                    answers.append(self._processor.answer(item, result))
            except GenerationError as error:
                answers.append(error)
        return answers

    def _decode(self, prepared: Sequence[PreparedRequest | GenerationError]) -> list[Decoded | GenerationError]:
        # Each call has a decoder of its own, so that calls from several threads share no state.
        decoder = Decoder(self.base, self._injector, slots=self._batch_size)
        refused: dict[int, GenerationError] = {}
        requests = []
        for i, item in enumerate(prepared):
            try:
                if isinstance(item, GenerationError):
                    raise item
                decoder.check(item.decode)
                requests.append(item.decode)
            except GenerationError as error:
                refused[i] = error
        decoded = iter(decoder.run(requests))
        return [refused.get(i) or next(decoded) for i in range(len(prepared))]

    def _prepare(self, found: Found) -> PreparedRequest | GenerationError:
        begun = time.perf_counter()
        adapters: dict[str, FlatAdapter | AdapterError] = {}
        for hit in found.hits if found.updates else ():
            try:
                factors = self._adapters.get(hit.passage.key)
                adapters[hit.passage.key] = flatten_adapter(self._injector.layout, factors, dtype=self.base.model.dtype)
            except AdapterError as error:
                adapters[hit.passage.key] = error
        try:
            return self._processor.build(found, adapters, {"fetch": (time.perf_counter() - begun) * 1e3})
        except GenerationError as error:  # the chat template refuses the turns
            return error


def open_engine(store: Store, config: Config, snapshot_id: str | None = None, *, gpus: float | None = None) -> Engine:
    """Open an engine on a snapshot of a store, by default the one in service.

    The index is unpacked into the local cache on first use; adapters are fetched when a question needs them. The
    calling thread is the one to compute, on all cores, or on the GPUs that its process holds (`gpus`; see
    `choose_device`).

    Raises:
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    compute_here()
    base = load_base_model(config.model, gpus=gpus)
    opened = open_snapshot(base, config, store, load_snapshot(store, snapshot_id))
    return Engine(base, opened.recipe, opened.processor, opened.source, batch_size=config.answer.batch_size)
