"""From a request to a decode request, and from the decoder's result to an answer.

The engine (`prag ask`, the demo) and the service share it, so that both write the same prompts. They differ in how they
wait for adapters and for the decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prag_core.errors import AdapterError, GenerationError, NotFiniteError, RetrievalError
from prag_core.identity import normalize
from prag_core.inference.request import Request
from prag_core.inference.route import choose
from prag_core.llm.base_model import BaseModel
from prag_core.llm.chat import answer_prefix_ids, question_ids
from prag_core.llm.decode_request import Decoded, DecodeRequest
from prag_core.llm.lora import FlatAdapter
from prag_core.prompts import MAX_NEW_TOKENS, final_answer, passage_text, reasons
from prag_core.records import (
    DEFAULT_COMBINE_STRENGTH,
    Answer,
    Hit,
    MergeRule,
    Mode,
    Passage,
    Route,
    Template,
    UsedPassage,
)
from prag_core.retrieval.kinds import Retriever
from prag_core.store.ledger import AdapterLocation

# The most passages to retrieve in search of some that the asker may read.
_MAX_HITS = 1024


@dataclass(frozen=True)
class Found:
    """A request whose passages were found, best first.

    `mode` is the one in which it is answered: its own, or the one that was chosen for `auto`, for the reason in `why`.
    """

    request: Request
    hits: tuple[Hit, ...]
    mode: Mode
    why: str = ""
    retrieve_ms: float = 0.0

    @property
    def updates(self) -> bool:
        """Whether passages go into the weights."""
        return self.mode in ("prag", "combine")


@dataclass(frozen=True)
class PreparedRequest:
    """A request that is ready to decode, with the use of each of its passages and the time spent so far."""

    found: Found
    decode: DecodeRequest
    passages: tuple[UsedPassage, ...]
    milliseconds: dict[str, float]

    @property
    def fallbacks(self) -> int:
        """How many passages are in the prompt because their adapters were not available."""
        return sum(bool(passage.note) for passage in self.passages)

    def overflowed(self, decoded: Decoded) -> bool:
        """Return whether the output is not finite because the sum of its (finite) adapters is too large."""
        return decoded.finish == "not_finite" and bool(self.decode.adapters)


class RequestProcessor:
    """Retrieves passages, writes prompts and makes answers for one snapshot.

    Args:
        base: The frozen base model.
        retriever: Finds passages, unless a request brings its own; None where each does.
        template: How questions are asked; it must be the template of the adapters' recipe.
        snapshot: The snapshot's id, which answers carry.
        max_new_tokens: The most tokens of an answer where its request does not say; by default 32, or 128 where the
            template lets the model reason.
        combine_strength: The factor of the adapters' weights in the mode `combine` where the request does not say. An
            adapter strong enough to answer without its passage may outweigh the prompt (docs/results/log.md).
        reader: An adapter trained to answer from passages in the prompt, and its weight; it is added wherever a passage
            is in the prompt: in `rag` and `combine`, and in `prag` for a passage without an adapter.
        hidden: Keys of passages that must not be used.
        find: Returns how a passage's adapter was trained, if it has one. Without it no request may ask for `auto`.
        route: The thresholds of `auto`; None where none were fitted.
    """

    def __init__(
        self,
        base: BaseModel,
        retriever: Retriever | None,
        *,
        template: Template = "direct",
        snapshot: str = "",
        max_new_tokens: int | None = None,
        combine_strength: float = DEFAULT_COMBINE_STRENGTH,
        reader: tuple[FlatAdapter, float] | None = None,
        hidden: Iterable[str] = (),
        find: Callable[[str], AdapterLocation | None] | None = None,
        route: Route | None = None,
    ) -> None:
        self.snapshot = snapshot
        self._tokenizer = base.tokenizer
        self._end_ids = base.end_ids
        self._model_name = base.name
        self._retriever = retriever
        self.template = template
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS[template]
        self._combine_strength = combine_strength
        self._reader = reader
        self._hidden = frozenset(hidden)
        self._find = find
        self._route = route

    def search(self, request: Request) -> Found:
        """Find the passages for a request: its own hits, or the best ones that its asker may read.

        For `auto`, what is found decides the mode. In `closed` there are none.

        Raises:
            RetrievalError: when the index cannot be searched, or there is none.
            ValueError: when the request asks for `auto` and nobody knows which passages have an adapter.
        """
        begun = time.perf_counter()
        mode, why = request.mode, ""
        if mode == "closed":
            return Found(request, (), mode)
        if mode != "auto":
            return Found(request, self._hits(request, request.top_k), mode, why, _ms_since(begun))
        if self._find is None:
            raise ValueError("mode 'auto' needs a snapshot, which knows the passages with an adapter; name a mode")
        # How far the best passage leads is seen only beside the next one.
        hits = self._hits(replace(request, min_score=0.0), max(request.top_k, 2))
        best = max(hits, key=lambda hit: hit.score, default=None)
        trained = best is not None and self._find(best.passage.key) is not None
        used = hits
        if request.hits is None:
            used = tuple(hit for hit in hits[: request.top_k] if hit.score >= request.min_score)
        scores = sorted((hit.score for hit in hits), reverse=True) if used else ()
        mode, why = choose(self._route, scores, trained)
        return Found(request, () if mode == "closed" else used, mode, why, _ms_since(begun))

    def _hits(self, request: Request, count: int) -> tuple[Hit, ...]:
        """Return a request's own hits, or the `count` best ones that its asker may read."""
        if request.hits is not None:
            return tuple(hit for hit in request.hits if self._may_use(hit.passage, request))
        if self._retriever is None:
            raise RetrievalError("there is no index to search", "give the question its passages (`Request.hits`)")
        wanted = count
        while True:
            hits = self._retriever.search(request.question, wanted, request.min_score)
            allowed = [hit for hit in hits if self._may_use(hit.passage, request)]
            # If passages among them must not be used, retrieve more, up to a limit.
            if len(allowed) >= count or len(hits) < wanted or wanted >= _MAX_HITS:
                return tuple(allowed[:count])
            wanted = min(4 * wanted, _MAX_HITS)

    def build(
        self,
        found: Found,
        adapters: Mapping[str, FlatAdapter | AdapterError],
        milliseconds: Mapping[str, float],
    ) -> PreparedRequest:
        """Make a request ready to decode. A passage whose adapter is an error goes into the prompt instead.

        Args:
            found: The request and its passages, as `search` returns them.
            adapters: For each hit its adapter, or the error instead of it; ignored unless `found.updates`.
            milliseconds: The time spent since the search, by step.
        """
        request = found.request
        # 1. Decide where each passage goes. Check again that it may be used, as late as possible.
        hits = [hit for hit in found.hits if self._may_use(hit.passage, request)]
        strength = request.strength or (self._combine_strength if found.mode == "combine" else 1.0)
        weighted: list[tuple[FlatAdapter, float]] = []
        used = []
        in_prompt: list[Passage] = []
        for hit, share in zip(hits, hit_weights(hits, request.weights), strict=True):
            passage, weight = hit.passage, strength * share
            adapter = adapters[passage.key] if found.updates else None
            fallback = isinstance(adapter, AdapterError)
            trained = self._find(passage.key) if self._find and found.updates and not fallback else None
            entry = UsedPassage(
                key=passage.key,
                title=passage.title,
                sources=passage.sources,
                score=hit.score,
                in_weights=found.updates and not fallback,
                in_prompt=fallback or found.mode in ("rag", "combine"),
                weight=weight if found.updates and not fallback else 0.0,
                note=adapter.message if isinstance(adapter, AdapterError) else "",
                text=passage.text,
                tokens=trained.tokens if trained else 0,
                last_loss=trained.last_loss if trained else 0.0,
                seconds=trained.seconds if trained else 0.0,
            )
            if adapter is not None and not isinstance(adapter, AdapterError):
                weighted.append((adapter, weight))
            if entry.in_prompt:
                in_prompt.append(passage)
            used.append(entry)
        if self._reader is not None and request.reader and in_prompt:
            weighted.append(self._reader)
        # 2. Write the prompt. It ends with the words with which each answer in training begins.
        begun = time.perf_counter()
        texts = [passage_text(passage) for passage in in_prompt]
        prompt = question_ids(self._tokenizer, request.question, texts, history=request.history, template=self.template)
        prompt += answer_prefix_ids(self._tokenizer, self.template)
        decode = DecodeRequest(
            prompt,
            request.max_new_tokens or self.max_new_tokens,
            stop_ids=frozenset() if request.ignore_eos else self._end_ids,
            stop_strings=request.stop,
            one_line=not request.ignore_eos,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            adapters=tuple(weighted),
        )
        spent = {"retrieve": found.retrieve_ms, **milliseconds, "prompt": _ms_since(begun)}
        return PreparedRequest(replace(found, hits=tuple(hits)), decode, tuple(used), spent)

    def without_adapters(self, prepared: PreparedRequest) -> PreparedRequest:
        """Make a request that has `overflowed` ready again, with all its passages in the prompt and no adapters."""
        reasons = {
            passage.key: AdapterError(passage.note or "the sum of this question's adapters is too large")
            for passage in prepared.passages
        }
        built = self.build(prepared.found, reasons, prepared.milliseconds)
        return replace(built, decode=replace(built.decode, adapters=()))

    def answer(self, prepared: PreparedRequest, decoded: Decoded) -> Answer:
        """Return the answer from the decoder's result.

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
            question=prepared.found.request.question,
            mode=prepared.found.mode,
            text=final_answer(decoded.text, self.template),
            reasoning=decoded.text.strip() if reasons(self.template) else "",
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
            why=prepared.found.why,
        )

    def failed(self, found: Found, error: GenerationError) -> Answer:
        """Return an empty answer that carries the error."""
        question = found.request.question
        return Answer(
            question, found.mode, "", snapshot=self.snapshot, finish="error", error=error.message, why=found.why
        )

    def _may_use(self, passage: Passage, request: Request) -> bool:
        if passage.key in self._hidden:
            return False
        if request.access is None or not passage.access:
            return True
        return not {*map(normalize, request.access)}.isdisjoint(map(normalize, passage.access))


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1e3


def hit_weights(hits: Sequence[Hit], weights: MergeRule) -> list[float]:
    """Return the weight of each hit's adapter.

    `sum`: 1, as in the paper. `mean`: 1/k. `score`: the square of its score in relation to the best one's. So the best
    passage counts in full, and one that is half as good a quarter: where one passage clearly fits the question, the
    others hardly disturb its adapter, and where several do, they add up.
    """
    if weights == "sum":
        return [1.0] * len(hits)
    if weights == "mean":
        return [1.0 / len(hits) for _ in hits]
    best = max((hit.score for hit in hits), default=0.0)
    return [(max(hit.score, 0.0) / best) ** 2 if best > 0 else 1.0 for hit in hits]
