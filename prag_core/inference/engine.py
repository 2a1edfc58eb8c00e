"""Retrieve, Update, Generate: answers questions from a snapshot, each with its own sum of adapters.

The engine holds the frozen model, the index and the way to the adapters; a request's adapters are arguments of
its forward passes (`prag_core.llm.lora`), so that one batch mixes modes, passages and numbers of passages, and
nothing of a request stays behind. It serves one caller at a time: for many users see `prag_core.inference.service`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from prag_core.config import Config
from prag_core.errors import AdapterError, GenerationError
from prag_core.inference.loaded_snapshot import open_snapshot
from prag_core.inference.processor import PreparedRequest, RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.decode_request import Decoded
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import Factors, Injector
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe
from prag_core.records import Answer
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot

__all__ = ["AdapterSource", "Engine", "Request", "open_engine"]


class AdapterSource(Protocol):
    """Gives a passage's verified factors by its key."""

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the factors, or raise AdapterError when they are missing or broken."""
        ...


class Engine:
    """Answers questions on one machine, in batches.

    Args:
        base: The frozen base model.
        recipe: The recipe that the adapters were trained by; gives their layout and scale.
        preparation: Retrieves and writes prompts.
        adapters: Gives adapters by key.
        batch_size: How many questions are decoded at once.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: TrainRecipe,
        preparation: RequestProcessor,
        adapters: AdapterSource,
        *,
        batch_size: int = 16,
    ) -> None:
        self.base = base
        self._injector = Injector(base.model, recipe)
        self._adapters = adapters
        self._batch_size = batch_size
        self._preparation = preparation

    def answer(self, request: Request) -> Answer:
        """Answer one question; see `answer_batch`.

        Raises:
            PromptTooLongError: when the question with its passages exceeds the model's context.
            NotFiniteError: when the model's output is not finite.
        """
        answers = self._answer_all([request])
        if isinstance(answers[0], GenerationError):
            raise answers[0]
        return answers[0]

    def answer_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer questions together, in the order given.

        A passage whose adapter is missing or broken goes into the prompt instead, and the answer says so; all of a
        question's passages do when the sum of their adapters is too large for the model. A question that cannot be
        answered (too long for the model's context, output that is not finite) gets an empty answer with `finish` =
        `error` and the reason in `error`; the others are not touched. The milliseconds are the question's own, but
        for what is done for other questions meanwhile.
        """
        return [
            self._preparation.failed(request, answer) if isinstance(answer, GenerationError) else answer
            for request, answer in zip(requests, self._answer_all(requests), strict=True)
        ]

    def close(self) -> None:
        """Leave the base model as it was found."""
        self._injector.close()

    def _answer_all(self, requests: Sequence[Request]) -> list[Answer | GenerationError]:
        prepared = [self._prepare(request) for request in requests]
        decoded = self._decode(prepared)
        # Adapters whose sum is too large fall back as those do that are missing.
        for place, found in enumerate(decoded):
            if isinstance(found, Decoded) and prepared[place].overflowed(found):
                prepared[place] = self._preparation.without_adapters(prepared[place])
                decoded[place] = self._decode([prepared[place]])[0]
        answers: list[Answer | GenerationError] = []
        for item, found in zip(prepared, decoded, strict=True):
            try:
                answers.append(self._preparation.answer(item, found) if isinstance(found, Decoded) else found)
            except GenerationError as error:
                answers.append(error)
        return answers

    def _decode(self, prepared: Sequence[PreparedRequest]) -> list[Decoded | GenerationError]:
        # A decoder for each call: calls from several threads share nothing that changes.
        decoder = Decoder(self.base, self._injector, slots=self._batch_size)
        refused: dict[int, GenerationError] = {}
        for place, item in enumerate(prepared):
            try:
                decoder.check(item.decode)
            except GenerationError as error:
                refused[place] = error
        decoded = iter(decoder.run([item.decode for place, item in enumerate(prepared) if place not in refused]))
        return [refused.get(place) or next(decoded) for place in range(len(prepared))]

    def _prepare(self, request: Request) -> PreparedRequest:
        begun = time.perf_counter()
        hits = self._preparation.search(request)
        found = time.perf_counter()
        adapters: dict[str, Factors | AdapterError] = {}
        for hit in hits if request.updates else ():
            try:
                adapters[hit.passage.key] = self._adapters.get(hit.passage.key)
            except AdapterError as error:
                adapters[hit.passage.key] = error
        spent = {"retrieve": (found - begun) * 1e3, "fetch": (time.perf_counter() - found) * 1e3}
        return self._preparation.build(request, hits, adapters, spent)


def open_engine(store: Store, config: Config, snapshot_id: str | None = None) -> Engine:
    """Open an engine on a snapshot of a store, by default the one in service.

    The index is unpacked into the local cache on first use; adapters are fetched when a question needs them. The
    calling thread is the one to compute, on all cores.

    Raises:
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    compute_here()
    base = load_base_model(config.model)
    opened = open_snapshot(base, config, store, load_snapshot(store, snapshot_id))
    return Engine(base, opened.recipe, opened.preparation, opened.source, batch_size=config.answer.batch_size)
