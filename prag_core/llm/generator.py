"""Generators continue prompts: their protocol, and the local model as one.

A generator returns one result for each prompt, in order. If one prompt fails, its result is an error; if the generator
itself fails, it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prag_core.errors import GenerationError, PromptTooLongError, TurnsError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.chat import WITHOUT_REASONING, chat_ids, document_ids
from prag_core.llm.reply import is_mark, open_mark
from prag_core.recipe import TrainRecipe

if TYPE_CHECKING:
    from prag_core.llm.decode_request import Decoded
    from prag_core.llm.lora import Factors, FlatAdapter

# Larger than in serving: here no user waits for the next token while a prompt is read.
_PREFILL_CHUNK = 2048
# More tokens than a chat template writes to open the assistant's turn.
_OPENING_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user turn to answer through the model's chat template, or with `chat=False` one text to continue.

    Generation ends before the first `stop`, if it is not empty. `max_new_tokens` can only lower the limit of the call.
    """

    text: str
    chat: bool = True
    stop: str = ""
    max_new_tokens: int | None = None

    def limit(self, max_new_tokens: int) -> int:
        """Return how many tokens may be generated for this prompt in a call that allows `max_new_tokens`."""
        return min(max_new_tokens, self.max_new_tokens or max_new_tokens)


class Generator(Protocol):
    """A language model that continues prompts. `fingerprint` identifies the model on all machines."""

    fingerprint: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        """Return one result for each prompt, in order: its text, or the error because of which it failed.

        A model may reason before it replies; `prag_core.llm.reply` separates the two.

        Temperature 0 takes the most likely token each time; `top_k` 0 considers all tokens. Equal prompts in one call
        get equal texts; another `seed` gives another text.

        Raises:
            GenerationError: when the generator itself cannot be used.
        """
        ...


class TransformersGenerator:
    """The base model as a Generator, on one device.

    Prompts are continued in `max_batch` slots, which hold up to `tokens_per_batch` tokens; a text that ends frees its
    slot for the next. An instruction with which all prompts of a call begin is computed once, and is kept for later
    calls that begin with it. Results do not depend on which prompts share a batch, except for rounding: each prompt has
    a random generator of its own, seeded by `seed` and its tokens. `adapter`, a recipe and its factors, is added to the
    weights for every prompt.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: tuple[TrainRecipe, Factors] | None = None,
        tokens_per_batch: int = 8192,
        max_batch: int = 16,
    ) -> None:
        # Imported here, because callers that only use an endpoint need no torch.
        from prag_core.llm.decoder import Decoder
        from prag_core.llm.lora import Injector, flatten_adapter

        self.fingerprint = base.fingerprint
        self._base = base
        injector: Injector | None = None
        self._adapters: tuple[tuple[FlatAdapter, float], ...] = ()
        if adapter is not None:
            injector = Injector(base.model, adapter[0])
            self._adapters = ((flatten_adapter(injector.layout, adapter[1], dtype=base.model.dtype), 1.0),)
        self._decoder = Decoder(
            base, injector, slots=max_batch, prefill_chunk=_PREFILL_CHUNK, max_tokens=tokens_per_batch
        )
        self._end_ids = base.end_ids
        # Reasoning may be marked by special tokens, which a decoded text leaves out.
        tokens = base.tokenizer.added_tokens_decoder.items()
        self._mark_ids = frozenset(id for id, token in tokens if token.special and is_mark(token.content))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        """Return one result for each prompt; a prompt that exceeds the model's context gets an error.

        The model is asked not to reason, if its chat template knows how. If it does reason, that is part of the result.
        """
        from prag_core.llm.decode_request import DecodeRequest

        results: list[str | GenerationError] = [""] * len(prompts)
        requests: dict[int, DecodeRequest] = {}
        for index, prompt in enumerate(prompts):
            try:
                request = DecodeRequest(
                    self._prompt_ids(prompt),
                    prompt.limit(max_new_tokens),
                    stop_ids=self._end_ids,
                    stop_strings=(prompt.stop,) if prompt.stop else (),
                    temperature=temperature,
                    top_k=top_k,
                    seed=seed,
                    adapters=self._adapters,
                )
                self._decoder.check(request)
                requests[index] = request
            except (PromptTooLongError, TurnsError) as error:
                results[index] = error
        if not self._adapters:  # what the bare model computes of a prefix holds nothing for one with an adapter
            self._decoder.prefixes.share([list(request.prompt[:-1]) for request in requests.values()])
        for index, decoded in zip(requests, self._decoder.run(list(requests.values())), strict=True):
            results[index] = self._reply(prompts[index], requests[index].prompt, decoded)
            if decoded.finish == "not_finite":
                results[index] = GenerationError(
                    f"{self._base.name}: the model's output for a prompt is not finite",
                    "load it as float32 (model.dtype)",
                )
        return results

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not prompt.chat:
            return document_ids(self._base.tokenizer, prompt.text)
        message = {"role": "user", "content": prompt.text}
        return chat_ids(self._base.tokenizer, [message], **WITHOUT_REASONING)

    def _reply(self, prompt: Prompt, ids: Sequence[int], decoded: Decoded) -> str:
        """Return the decoded text, in a chat with the marks of its reasoning."""
        if not prompt.chat:
            return decoded.text
        tokenizer, text = self._base.tokenizer, decoded.text
        if not self._mark_ids.isdisjoint(decoded.tokens):
            text = tokenizer.decode(decoded.tokens)
        return open_mark(tokenizer.decode(ids[-_OPENING_TOKENS:])) + text
