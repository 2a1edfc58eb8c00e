"""Asking a language model: the Generator and Scorer protocols, and the local model that is both.

A generator takes prompts and gives one result a prompt, in order. What is wrong with one prompt comes back as an
error in its place; what is wrong with the generator is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from prag_core.errors import GenerationError, PromptTooLongError
from prag_core.llm.base_model import BaseModel

if TYPE_CHECKING:
    from prag_core.llm.prefix_cache import Prefix


# Nobody waits for the next token of a text that is generated whole: prompts are read in large pieces.
_PREFILL_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to continue (`chat=False`), or one user turn to answer through the model's chat template.

    Generation ends before the first `stop`, where there is one; `max_new_tokens` lowers the limit of the call.
    """

    text: str
    chat: bool = True
    stop: str = ""
    max_new_tokens: int | None = None

    def limit(self, max_new_tokens: int) -> int:
        """Return how many tokens may be generated for this prompt in a call that allows `max_new_tokens`."""
        return min(max_new_tokens, self.max_new_tokens or max_new_tokens)


class Generator(Protocol):
    """A language model that continues prompts. `fingerprint` names the model wherever it runs."""

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
        """Return one text a prompt, in order, or in its place the error of the prompt that failed.

        Temperature 0 takes the likeliest token each time, `top_k` 0 considers all tokens. Equal prompts in one
        call get equal texts; another `seed` gives another text.

        Raises:
            GenerationError: when the generator itself cannot be used.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """A language model that says how likely a text is after another one."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the mean log-probability of the tokens of each second text after its first text.

        A pair that does not fit into the model's context, or whose texts hold no token, scores minus infinity.
        """
        ...


class TransformersGenerator:
    """The base model as a Generator and Scorer, on one device.

    Prompts are continued in `max_batch` slots, which hold `tokens_per_batch` tokens; a text that ends makes room for
    the next. The tokens that all prompts of a call begin with (a few-shot text, an instruction) are computed once,
    and not again while later calls begin alike. Greedy results do not depend on which prompts share a batch, but
    for the rounding of the dtype; sampled ones neither, since each prompt has its own random numbers, drawn from
    `seed` and its tokens.
    """

    def __init__(self, base: BaseModel, *, tokens_per_batch: int = 8192, max_batch: int = 16) -> None:
        # Imported here: who only talks to an endpoint needs no torch.
        from prag_core.llm.decoder import Decoder

        self.fingerprint = base.fingerprint
        self._base = base
        self._tokens_per_batch = tokens_per_batch
        self._max_batch = max_batch
        self._decoder = Decoder(base, slots=max_batch, prefill_chunk=_PREFILL_CHUNK, max_tokens=tokens_per_batch)
        stops = base.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self._stop_ids = frozenset(i for i in [*stops, base.tokenizer.eos_token_id] if i is not None)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        """Return one text a prompt; a prompt that is too long for the model's context is an error in its place."""
        from prag_core.llm.decoder import DecodeRequest

        results: list[str | GenerationError] = [""] * len(prompts)
        requests: dict[int, DecodeRequest] = {}
        for index, prompt in enumerate(prompts):
            request = DecodeRequest(
                self._prompt_ids(prompt),
                prompt.limit(max_new_tokens),
                stop_ids=self._stop_ids,
                stop_strings=(prompt.stop,) if prompt.stop else (),
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            )
            try:
                self._decoder.check(request)
                requests[index] = request
            except PromptTooLongError as error:
                results[index] = error
        self._decoder.prefixes.share([list(request.prompt[:-1]) for request in requests.values()])
        for index, decoded in zip(requests, self._decoder.run(list(requests.values())), strict=True):
            results[index] = decoded.text
            if decoded.finish == "not_finite":
                results[index] = GenerationError(
                    f"{self._base.name}: the model's output for a prompt is not finite",
                    "load it as float32 (model.dtype)",
                )
        return results

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the mean log-probability of each second text after its first; see `Scorer`."""
        results = [float("-inf")] * len(pairs)
        rows: list[_Row] = []
        for index, (before, text) in enumerate(pairs):
            ids, target = self._text_ids(before), self._encode(text)
            if ids and target and len(ids) + len(target) <= self._decoder.context:
                rows.append(_Row(index, ids + target, len(target)))
        prefix, shared = self._decoder.prefixes.share([row.ids[: -row.limit - 1] for row in rows])
        for batch in self._batches(rows):
            for row, mean in zip(batch, self._mean_log_probabilities(batch, prefix, shared), strict=True):
                results[row.index] = mean
        return results

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._base.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text as the model expects a text to begin (some models want a BOS there)."""
        ids: list[int] = self._base.tokenizer.encode(text)
        eos = self._base.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not prompt.chat:
            return self._text_ids(prompt.text)
        message = [{"role": "user", "content": prompt.text}]
        return self._encode(
            self._base.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yield the rows, longest first, in batches whose padded tokens keep to the budget."""
        batch: list[_Row] = []
        width = 0
        for row in sorted(rows, key=lambda row: (-len(row.ids), -row.limit, row.index)):
            width = max(width, len(row.ids))
            full = len(batch) == self._max_batch or width * (len(batch) + 1) > self._tokens_per_batch
            if batch and full:
                yield batch
                batch, width = [], len(row.ids)
            batch.append(row)
        if batch:
            yield batch

    def _mean_log_probabilities(self, batch: list[_Row], prefix: Prefix | None, shared: int) -> list[float]:
        """Score rows whose first `shared` tokens are those of `prefix`, in one forward pass."""
        import torch

        from prag_core.llm.decoder import padded

        device = self._base.device
        ids = padded([row.ids[shared:] for row in batch]).to(device)
        width = ids.shape[1]
        # The logits at a position are about the token after it; those before the first that counts are not computed.
        first = min(len(row.ids) - row.limit - 1 - shared for row in batch)
        with torch.inference_mode():
            logits = self._base.model(
                input_ids=ids,
                position_ids=torch.arange(shared, shared + width, device=device)[None],
                cache=prefix.cache(shared, len(batch)) if prefix is not None else None,
                use_cache=prefix is not None,
                logits_to_keep=width - first,
            ).logits
            means = []
            for i, row in enumerate(batch):
                begin = len(row.ids) - row.limit - 1 - shared - first
                table = logits[i, begin : begin + row.limit].float().log_softmax(-1)
                target = torch.tensor(row.ids[-row.limit :], device=device)
                means.append(float(table.gather(1, target[:, None]).mean()))
        return means


@dataclass(frozen=True, slots=True)
class _Row:
    """A text to score: its place in the call, its token ids, and how many of the last ones count."""

    index: int
    ids: list[int]
    limit: int
