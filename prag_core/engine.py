"""Retrieve, Update, Generate: answers questions from a snapshot, each with its own sum of adapters.

The engine holds the frozen model, the index and the way to the adapters; a request's adapters are arguments of
its forward passes (`prag_core.lora`), so that one batch mixes modes, passages and numbers of passages, and
nothing of a request stays behind.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from prag_core.adapter_store import LedgerSource, open_adapters
from prag_core.config import Config
from prag_core.decode import Decoder, DecodeRequest
from prag_core.errors import AdapterError, StoreError
from prag_core.examples import answer_prefix_ids, question_ids
from prag_core.forgetting import forgotten_keys
from prag_core.lora import Factors, Injector
from prag_core.models import BaseModel, cache_dir, load_base_model
from prag_core.prompts import final_answer, passage_text
from prag_core.recipe import TrainRecipe
from prag_core.records import Answer, Hit, Mode, Passage, Template, UsedPassage, Weights
from prag_core.retrieval import Retriever, open_index
from prag_core.snapshot import Snapshot, load_snapshot
from prag_core.store import Store

_MAX_NEW_TOKENS: dict[Template, int] = {"direct": 32, "chain_of_thought": 128}


class AdapterSource(Protocol):
    """Gives a passage's verified factors by its key."""

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the factors, or raise AdapterError when they are missing or broken."""
        ...


@dataclass(frozen=True)
class Request:
    """One question and how it is to be answered.

    `hits` are the retrieved passages when the caller has them already (an oracle, an evaluation); otherwise the
    engine retrieves.
    """

    question: str
    mode: Mode = "combine"
    top_k: int = 3
    weights: Weights = "sum"
    hits: tuple[Hit, ...] | None = None


@dataclass(frozen=True)
class _Prepared:
    """A request made ready to generate: its prompt, its weighted adapters, and what becomes of each passage."""

    request: Request
    prompt: list[int]
    adapters: list[tuple[Factors, float]]
    passages: tuple[UsedPassage, ...]
    milliseconds: dict[str, float]


class Engine:
    """Answers questions on one machine, in batches.

    Args:
        base: The frozen base model.
        recipe: The recipe that the adapters were trained by; gives their layout and scale.
        retriever: Finds passages; never called in the mode `closed`.
        adapters: Gives adapters by key.
        snapshot: The id that answers carry.
        forgotten: Keys of passages that are never used, whoever retrieved them.
        max_new_tokens: The most tokens of an answer; by default 32, and 128 where the recipe's template reasons.
        batch_size: How many questions are decoded at once.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: TrainRecipe,
        retriever: Retriever,
        adapters: AdapterSource,
        *,
        snapshot: str = "",
        forgotten: Collection[str] = (),
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.base = base
        self._injector = Injector(base.model, recipe)
        self._retriever = retriever
        self._adapters = adapters
        self._snapshot = snapshot
        self._forgotten = frozenset(forgotten)
        self._template = recipe.template
        self._max_new_tokens = max_new_tokens or _MAX_NEW_TOKENS[recipe.template]
        self._batch_size = batch_size
        # An answer is one line: a newline ends it as the end of turn does.
        newline = base.tokenizer.encode("\n", add_special_tokens=False)
        self._stop_ids = frozenset([base.tokenizer.eos_token_id, *newline[-1:]])

    def answer(self, request: Request) -> Answer:
        """Answer one question; see `answer_batch`."""
        return self.answer_batch([request])[0]

    def answer_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer questions together, in the order given.

        A passage whose adapter is missing or broken goes into the prompt instead, and the answer says so. The
        milliseconds are the question's own, but for what is done for other questions meanwhile.

        Raises:
            PromptTooLongError: when a question with its passages exceeds the model's context.
        """
        return self._generate([self._prepare(request) for request in requests])

    def close(self) -> None:
        """Leave the base model as it was found."""
        self._injector.close()

    def _prepare(self, request: Request) -> _Prepared:
        milliseconds = {}
        # 1. Retrieve.
        begun = time.perf_counter()
        hits: Sequence[Hit] = ()
        if request.mode != "closed":
            hits = self._retrieve(request) if request.hits is None else self._remembered(request.hits)
        milliseconds["retrieve"] = (time.perf_counter() - begun) * 1e3

        # 2. Update: fetch the adapters; what cannot be had goes into the prompt.
        begun = time.perf_counter()
        adapters: list[tuple[Factors, float]] = []
        used = []
        in_prompt: list[Passage] = []
        for hit, weight in zip(hits, hit_weights(hits, request.weights), strict=True):
            passage = hit.passage
            entry = UsedPassage(
                key=passage.key,
                title=passage.title,
                sources=passage.sources,
                score=hit.score,
                in_weights=False,
                in_prompt=request.mode in ("rag", "combine"),
            )
            if request.mode in ("prag", "combine"):
                try:
                    adapters.append((self._adapters.get(passage.key), weight))
                    entry = replace(entry, in_weights=True, weight=weight)
                except AdapterError as error:
                    entry = replace(entry, in_prompt=True, note=error.message)
            if entry.in_prompt:
                in_prompt.append(passage)
            used.append(entry)
        milliseconds["fetch"] = (time.perf_counter() - begun) * 1e3

        # 3. The prompt opens the answer with the words that every answer in training opens with.
        tokenizer = self.base.tokenizer
        texts = [passage_text(passage) for passage in in_prompt]
        prompt = question_ids(tokenizer, request.question, texts, self._template)
        prompt += answer_prefix_ids(tokenizer, self._template)
        return _Prepared(request, prompt, adapters, tuple(used), milliseconds)

    def _retrieve(self, request: Request) -> list[Hit]:
        """Search for more than is wanted as long as forgotten passages take places among what is found."""
        asked = request.top_k
        while True:
            hits = self._retriever.search(request.question, asked)
            kept = self._remembered(hits)
            if len(kept) >= request.top_k or len(hits) < asked:
                return kept[: request.top_k]
            asked *= 2

    def _remembered(self, hits: Sequence[Hit]) -> list[Hit]:
        return [hit for hit in hits if hit.passage.key not in self._forgotten]

    def _generate(self, batch: Sequence[_Prepared]) -> list[Answer]:
        # A decoder for each call: calls from several threads share nothing that changes.
        decoder = Decoder(self.base, self._injector, slots=self._batch_size)
        decoded = decoder.run(
            [
                DecodeRequest(item.prompt, self._max_new_tokens, stop_ids=self._stop_ids, adapters=tuple(item.adapters))
                for item in batch
            ]
        )
        return [
            Answer(
                question=item.request.question,
                mode=item.request.mode,
                text=final_answer(result.text, self._template),
                reasoning="" if self._template == "direct" else result.text.strip(),
                passages=item.passages,
                prompt_tokens=len(item.prompt),
                new_tokens=len(result.tokens),
                snapshot=self._snapshot,
                milliseconds={
                    **item.milliseconds,
                    "inject": result.inject_ms,
                    "prefill": result.prefill_ms,
                    "decode": result.decode_ms,
                },
            )
            for item, result in zip(batch, decoded, strict=True)
        ]


def open_engine(store: Store, config: Config, snapshot_id: str | None = None) -> Engine:
    """Open an engine on a snapshot of a store, by default the one in service.

    The index is unpacked into the local cache on first use; adapters are fetched when a question needs them.

    Raises:
        StoreError: when nothing is published, or the snapshot was made with another base model.
        ModelError, RetrievalError: when the model or the index cannot be opened.
    """
    snapshot = load_snapshot(store, snapshot_id)
    base = load_base_model(config.model)
    check_base_model(snapshot, store, config.model.name, base.fingerprint)
    retriever = open_index(store.fs, store.root, snapshot.index, cache_dir() / "indexes", config.index)
    adapter_store, train = open_adapters(store, snapshot.recipe)
    return Engine(
        base,
        train,
        retriever,
        LedgerSource(adapter_store, snapshot.ledger_parts),
        snapshot=snapshot.id,
        forgotten=forgotten_keys(store, snapshot),
        max_new_tokens=config.answer.max_new_tokens,
        batch_size=config.answer.batch_size,
    )


def check_base_model(snapshot: Snapshot, store: Store, name: str, found: str) -> None:
    """Check that the base model `name`, whose fingerprint is `found`, is the snapshot's.

    Raises:
        StoreError: when the snapshot was made with another one.
    """
    if found != snapshot.base_model:
        raise StoreError(
            f"store = {store.url!r} holds adapters for the base model {snapshot.base_model}; "
            f"model.name = {name!r} is {found}",
            "name the model that the store was made with, or another store for this model",
        )


def hit_weights(hits: Sequence[Hit], weights: Weights) -> list[float]:
    """Return the weight of each hit's adapter: 1 (`sum`, the paper), 1/k (`mean`), or its share of the scores."""
    if weights == "sum":
        return [1.0] * len(hits)
    if weights == "mean":
        return [1.0 / len(hits) for _ in hits]
    total = sum(max(hit.score, 0.0) for hit in hits)
    return [max(hit.score, 0.0) / total if total else 1.0 / len(hits) for hit in hits]
