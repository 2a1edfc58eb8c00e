"""Generators continue prompts: their protocol, and the local model as one.

A generator is asked for one prompt at a time, by as many coroutines as keep it busy. If a prompt fails, its result is
an error; if the generator itself fails, it raises.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from prag_core.errors import GenerationError, PromptTooLongError, TurnsError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.chat import WITHOUT_REASONING, chat_ids, document_ids
from prag_core.llm.reply import is_mark, open_mark
from prag_core.recipe import TrainRecipe

if TYPE_CHECKING:
    from prag_core.llm.decode_request import Decoded, DecodeRequest
    from prag_core.llm.decoder import Decoder
    from prag_core.llm.lora import Factors, FlatAdapter

# Larger than in serving: here no user waits for the next token while a prompt is read.
_PREFILL_CHUNK = 2048
# More tokens than a chat template writes to open the assistant's turn.
_OPENING_TOKENS = 16
# So many turns of the event loop bring a coroutine from a reply to its next question.
_TURNS = 8
# A prompt is compared with so many recent ones, and with as many that come with it.
_COMPARED = 16
# On a CPU a step with more rows takes longer in proportion.
CPU_ROWS, _CPU_TOKENS = 16, 8192
# On a GPU keys and values may take this share of the free memory: they are copied when the batch grows.
_CACHE_SHARE = 0.25
MOST_ROWS = 256
_TOKENS_PER_ROW = 512


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user turn to answer through the model's chat template, or with `chat=False` one text to continue.

    Generation ends before the first `stop`, if it is not empty.
    """

    text: str
    chat: bool = True
    stop: str = ""


class Generator(Protocol):
    """A language model that continues prompts.

    `fingerprint` identifies the model on all machines. `concurrency` is how many prompts to have under way at once, so
    that the model is always busy.
    """

    fingerprint: str
    concurrency: int

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        """Return the text that continues a prompt, or the error because of which it failed.

        A model may reason before it replies; `prag_core.llm.reply` separates the two.

        Temperature 0 takes the most likely token each time; `top_k` 0 considers all tokens. Equal prompts with an equal
        `seed` get equal texts; another `seed` gives another text.

        Raises:
            GenerationError: when the generator itself cannot be used.
        """
        ...

    async def close(self) -> None:
        """Give back what belongs to the running event loop. The generator may be asked again, also in another loop."""
        ...


async def ask_all(
    generator: Generator,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[str | GenerationError]:
    """Ask for all prompts at once, and return their results in order; see `Generator.ask`."""
    settings = {"max_new_tokens": max_new_tokens, "top_k": top_k, "seed": seed}
    asked = [asyncio.create_task(generator.ask(prompt, temperature=temperature, **settings)) for prompt in prompts]
    try:
        return await asyncio.gather(*asked)
    finally:
        for task in asked:
            task.cancel()


class _Decoding:
    """Decodes the requests of many coroutines in one batch, a step at a time, as long as one of them waits.

    A beginning that a prompt shares with another one is computed once, if `shares` says so.
    """

    def __init__(self, decoder: Decoder, shares: bool, on_step: Callable[[], None]) -> None:
        self._decoder = decoder
        self._shares = shares
        self._on_step = on_step
        self._new: list[tuple[DecodeRequest, asyncio.Future[Decoded]]] = []
        self._waiting: dict[int, asyncio.Future[Decoded]] = {}
        # The prompts in which the next one may find a beginning that it shares.
        self._recent: deque[list[int]] = deque(maxlen=_COMPARED)
        self._steps: asyncio.Task[None] | None = None

    async def decode(self, request: DecodeRequest) -> Decoded:
        """Return the result of a request, or raise what a step raises. If the caller is cancelled, its row is freed."""
        result: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()
        self._new.append((request, result))
        if self._steps is None or self._steps.done():
            self._steps = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        while self._new or self._waiting:
            # Who has just got a reply asks its next question before the step.
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            try:
                for id in [id for id, result in self._waiting.items() if result.cancelled()]:
                    self._decoder.cancel(id)
                    del self._waiting[id]
                self._submit()
                events = self._decoder.step()
            except Exception as error:
                self._decoder.reset()
                lost = [*self._waiting.values(), *(result for _, result in self._new)]
                self._waiting, self._new = {}, []
                for result in lost:
                    if not result.done():
                        result.set_exception(error)
                return
            for event in events:
                if event.result is not None:
                    self._waiting.pop(event.id).set_result(event.result)
            self._on_step()

    def _submit(self) -> None:
        """Hand over the new requests: the longest first, so that prompts of similar length are read together."""
        self._new = [(request, result) for request, result in self._new if not result.cancelled()]
        self._new.sort(key=lambda one: (-len(one[0].prompt), -one[0].max_new_tokens))
        if self._shares:
            self._share([list(request.prompt[:-1]) for request, _ in self._new])
        while self._new:
            id = self._decoder.submit(self._new[0][0])
            self._waiting[id] = self._new.pop(0)[1]

    def _share(self, prompts: list[list[int]]) -> None:
        """Compute what each of the prompts has in common with another one, unless it is known."""
        from prag_core.llm.prefix_cache import common_length

        compared = [*self._recent, *prompts[:_COMPARED]]
        for ids in prompts:
            others = [other for other in compared if other != ids]
            if others:
                self._decoder.prefixes.share([max(others, key=partial(common_length, ids)), ids])
        self._recent.extend(prompts)


class TransformersGenerator:
    """The base model as a Generator, on one device.

    Prompts are continued in `max_batch` rows, which hold up to `tokens_per_batch` tokens (by default what suits the
    device); a text that ends frees its row for the next. An instruction with which prompts begin is computed once.
    Results do not depend on which prompts share a batch, except for rounding: each prompt has a random generator of its
    own, seeded by `seed` and its tokens. `adapter`, a recipe and its factors, is added to the weights for every prompt.
    `on_progress` is called after each decoding step.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: tuple[TrainRecipe, Factors] | None = None,
        tokens_per_batch: int | None = None,
        max_batch: int | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        # Imported here, because callers that only use an endpoint need no torch.
        from prag_core.llm.decoder import Decoder
        from prag_core.llm.lora import Injector, flatten_adapter

        rows, tokens = batch_size(base)
        rows = max_batch or rows
        self.fingerprint = base.fingerprint
        # As many wait as run, so that a row that becomes free has its next prompt at once.
        self.concurrency = 2 * rows
        self._base = base
        injector: Injector | None = None
        self._adapters: tuple[tuple[FlatAdapter, float], ...] = ()
        if adapter is not None:
            injector = Injector(base.model, adapter[0])
            self._adapters = ((flatten_adapter(injector.layout, adapter[1], dtype=base.model.dtype), 1.0),)
        self._decoder = Decoder(
            base, injector, slots=rows, prefill_chunk=_PREFILL_CHUNK, max_tokens=tokens_per_batch or tokens
        )
        # What the bare model computes of a beginning holds nothing for one with an adapter.
        self._decoding = _Decoding(self._decoder, adapter is None, on_progress)
        self._end_ids = base.end_ids
        # Reasoning may be marked by special tokens, which a decoded text leaves out.
        tokens_added = base.tokenizer.added_tokens_decoder.items()
        self._mark_ids = frozenset(id for id, token in tokens_added if token.special and is_mark(token.content))

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        """Return the text that continues a prompt; a prompt that exceeds the model's context gets an error.

        The model is asked not to reason, if its chat template knows how. If it does reason, that is part of the result.
        """
        from prag_core.llm.decode_request import DecodeRequest

        try:
            request = DecodeRequest(
                self._prompt_ids(prompt),
                max_new_tokens,
                stop_ids=self._end_ids,
                stop_strings=(prompt.stop,) if prompt.stop else (),
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                adapters=self._adapters,
            )
            self._decoder.check(request)
        except (PromptTooLongError, TurnsError) as error:
            return error
        decoded = await self._decoding.decode(request)
        if decoded.finish == "not_finite":
            return GenerationError(
                f"{self._base.name}: the model's output for a prompt is not finite", "load it as float32 (model.dtype)"
            )
        return self._reply(prompt, request.prompt, decoded)

    async def close(self) -> None:
        """Do nothing: the model stays loaded."""

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


def batch_size(base: BaseModel) -> tuple[int, int]:
    """Return how many rows to decode at once on the model's device, and how many tokens they may hold together."""
    if base.device.type != "cuda":
        return CPU_ROWS, _CPU_TOKENS
    import torch

    config = base.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * width * base.model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(base.device)
    tokens = max(_CPU_TOKENS, int(free * _CACHE_SHARE) // bytes_per_token)
    return min(MOST_ROWS, max(CPU_ROWS, tokens // _TOKENS_PER_ROW)), tokens
