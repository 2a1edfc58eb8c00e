"""From a request to what the decoder takes, and from what the decoder gives to an answer.

The engine (`prag ask`, the demo) and the service share it, so that both ask the same question in the same words.
What differs is how they wait: for adapters, and for the decoder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prag_core.errors import AdapterError, GenerationError, NotFiniteError
from prag_core.inference.request import Request
from prag_core.llm.base_model import BaseModel
from prag_core.llm.chat import answer_prefix_ids, question_ids
from prag_core.llm.decode_request import Decoded, DecodeRequest
from prag_core.llm.lora import Factors
from prag_core.prompts import final_answer, passage_text
from prag_core.records import Answer, Hit, MergeRule, Passage, Template, UsedPassage
from prag_core.retrieval.kinds import Retriever

# Among so many of the best passages those that the asker may see are sought.
_DEEPEST = 1024
_MAX_NEW_TOKENS: dict[Template, int] = {"direct": 32, "chain_of_thought": 128}


@dataclass(frozen=True)
class PreparedRequest:
    """A request made ready to generate: what the decoder takes, and what becomes of each passage."""

    request: Request
    hits: tuple[Hit, ...]
    decode: DecodeRequest
    passages: tuple[UsedPassage, ...]
    milliseconds: dict[str, float]

    @property
    def fallbacks(self) -> int:
        """How many passages are in the prompt because their adapters could not be had."""
        return sum(bool(passage.note) for passage in self.passages)

    def overflowed(self, decoded: Decoded) -> bool:
        """Whether the sum of its adapters, each of them finite, made the model's output something that is not."""
        return decoded.finish == "not_finite" and bool(self.decode.adapters)


class RequestProcessor:
    """Retrieves, writes prompts and reads answers for one snapshot.

    Args:
        base: The frozen base model.
        retriever: Finds passages; never called in the mode `closed`.
        template: How questions are asked: the recipe's, by which the adapters were trained.
        snapshot: The id that answers carry.
        max_new_tokens: The most tokens of an answer, when its request does not say; by default 32, and 128 where
            the template lets the model reason.
        combine_strength: What the adapters' weights are multiplied by in the mode `combine`, when its request does
            not say. An adapter strong enough to answer without its passage may drown what the prompt says
            (docs/quality.md).
        reader: An adapter that is added to the passages' own, with its weight, in the mode `combine`: one that has
            learned to answer from passages in the prompt.
        hidden: Keys of passages that must not be used any more.
    """

    def __init__(
        self,
        base: BaseModel,
        retriever: Retriever,
        *,
        template: Template = "direct",
        snapshot: str = "",
        max_new_tokens: int | None = None,
        combine_strength: float = 1.0,
        reader: tuple[Factors, float] | None = None,
        hidden: Iterable[str] = (),
    ) -> None:
        self.snapshot = snapshot
        self._tokenizer = base.tokenizer
        self._model_name = base.name
        self._retriever = retriever
        self.template = template
        self.max_new_tokens = max_new_tokens or _MAX_NEW_TOKENS[template]
        self._combine_strength = combine_strength
        self._reader = reader
        self._hidden = frozenset(hidden)
        # An answer is one line: a newline ends it as the end of turn does.
        newline = self._tokenizer.encode("\n", add_special_tokens=False)
        self._stop_ids = frozenset([self._tokenizer.eos_token_id, *newline[-1:]])

    def search(self, request: Request) -> tuple[Hit, ...]:
        """Return the passages for a request, best first: those it brings, or the best that its asker may see.

        Raises:
            RetrievalError: when the index cannot be searched.
        """
        if request.mode == "closed":
            return ()
        if request.hits is not None:
            return tuple(hit for hit in request.hits if self._may_use(hit.passage, request))
        wanted = request.top_k
        while True:
            hits = self._retriever.search(request.question, wanted, request.min_score)
            seen = [hit for hit in hits if self._may_use(hit.passage, request)]
            # What must not be seen takes no place among the top k: look further down, though not without end.
            if len(seen) >= request.top_k or len(hits) < wanted or wanted >= _DEEPEST:
                return tuple(seen[: request.top_k])
            wanted = min(4 * wanted, _DEEPEST)

    def build(
        self,
        request: Request,
        hits: Sequence[Hit],
        adapters: Mapping[str, Factors | AdapterError],
        milliseconds: Mapping[str, float],
    ) -> PreparedRequest:
        """Return a request made ready: a passage whose adapter is an error goes into the prompt instead.

        Args:
            request: The request.
            hits: What `search` found for it.
            adapters: The factors of each hit, or why they cannot be had; not looked at unless it `updates`.
            milliseconds: What was spent so far, by step.
        """
        # 1. Which passages go where. Who may read what is asked again, at the last moment.
        hits = [hit for hit in hits if self._may_use(hit.passage, request)]
        strength = request.strength or (self._combine_strength if request.mode == "combine" else 1.0)
        summands: list[tuple[Factors, float]] = []
        used = []
        in_prompt: list[Passage] = []
        for hit, share in zip(hits, hit_weights(hits, request.weights), strict=True):
            passage, weight = hit.passage, strength * share
            factors = adapters[passage.key] if request.updates else None
            fallback = isinstance(factors, AdapterError)
            entry = UsedPassage(
                key=passage.key,
                title=passage.title,
                sources=passage.sources,
                score=hit.score,
                in_weights=request.updates and not fallback,
                in_prompt=fallback or request.mode in ("rag", "combine"),
                weight=weight if request.updates and not fallback else 0.0,
                note=factors.message if isinstance(factors, AdapterError) else "",
            )
            if factors is not None and not isinstance(factors, AdapterError):
                summands.append((factors, weight))
            if entry.in_prompt:
                in_prompt.append(passage)
            used.append(entry)
        if self._reader is not None and request.mode == "combine" and in_prompt:
            summands.append(self._reader)
        # 2. The prompt opens the answer with the words that every answer in training opens with.
        begun = time.perf_counter()
        texts = [passage_text(passage) for passage in in_prompt]
        prompt = question_ids(self._tokenizer, request.question, texts, history=request.history, template=self.template)
        prompt += answer_prefix_ids(self._tokenizer, self.template)
        decode = DecodeRequest(
            prompt,
            request.max_new_tokens or self.max_new_tokens,
            stop_ids=frozenset() if request.ignore_eos else self._stop_ids,
            stop_strings=request.stop,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            adapters=tuple(summands),
        )
        spent = {**milliseconds, "prompt": (time.perf_counter() - begun) * 1e3}
        return PreparedRequest(request, tuple(hits), decode, tuple(used), spent)

    def without_adapters(self, prepared: PreparedRequest) -> PreparedRequest:
        """Return a request made ready again with all of its passages in the prompt: it has `overflowed`."""
        reasons = {
            passage.key: AdapterError(passage.note or "the sum of this question's adapters is too large")
            for passage in prepared.passages
        }
        built = self.build(prepared.request, prepared.hits, reasons, prepared.milliseconds)
        return replace(built, decode=replace(built.decode, adapters=()))

    def answer(self, prepared: PreparedRequest, decoded: Decoded) -> Answer:
        """Return the answer that was decoded.

        Raises:
            NotFiniteError: when the model's output was not finite.
        """
        if decoded.finish == "not_finite":
            titles = ", ".join(passage.title or passage.key for passage in prepared.passages if passage.in_weights)
            raise NotFiniteError(
                f"{self._model_name}: its output is not finite with the adapters of {titles or 'no passage'}",
                "load it as float32 (model.dtype), or make these adapters again",
            )
        return Answer(
            question=prepared.request.question,
            mode=prepared.request.mode,
            text=final_answer(decoded.text, self.template),
            reasoning="" if self.template == "direct" else decoded.text.strip(),
            passages=prepared.passages,
            prompt_tokens=len(prepared.decode.prompt),
            new_tokens=len(decoded.tokens),
            snapshot=self.snapshot,
            finish=decoded.finish,
            milliseconds={
                **prepared.milliseconds,
                "wait": decoded.wait_ms,
                "inject": decoded.inject_ms,
                "prefill": decoded.prefill_ms,
                "decode": decoded.decode_ms,
            },
        )

    def failed(self, request: Request, error: GenerationError) -> Answer:
        """Return the empty answer that stands for a request which could not be answered, and says why."""
        return Answer(request.question, request.mode, "", snapshot=self.snapshot, finish="error", error=error.message)

    def _may_use(self, passage: Passage, request: Request) -> bool:
        if passage.key in self._hidden:
            return False
        return request.access is None or not passage.access or not request.access.isdisjoint(passage.access)


def hit_weights(hits: Sequence[Hit], weights: MergeRule) -> list[float]:
    """Return the weight of each hit's adapter: 1 (`sum`, the paper), 1/k (`mean`), or its share of the scores."""
    if weights == "sum":
        return [1.0] * len(hits)
    if weights == "mean":
        return [1.0 / len(hits) for _ in hits]
    total = sum(max(hit.score, 0.0) for hit in hits)
    return [max(hit.score, 0.0) / total if total else 1.0 / len(hits) for hit in hits]
