"""Asking a language model: the Generator and Scorer protocols, and the local model that is both.

A generator takes prompts and gives one result a prompt, in order. What is wrong with one prompt comes back as an
error in its place; what is wrong with the generator is raised.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from prag_core.errors import GenerationError
from prag_core.models import BaseModel

# Fewer common tokens than this are not worth a forward pass of their own.
_SHORTEST_SHARED_PREFIX = 32
# A stop string is looked for in the text of so many last tokens.
_STOP_WINDOW = 8


class PromptTooLongError(GenerationError):
    """A prompt and the text it asks for do not fit into the model's context."""


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
    """The base model as a Generator and Scorer: length-sorted batches under a token budget, on one device.

    The tokens that all prompts of a call begin with (a few-shot text, an instruction) are computed once. Greedy
    results do not depend on which prompts share a batch, but for the rounding of the dtype; sampled ones neither,
    since each prompt has its own random numbers, drawn from `seed` and its tokens.
    """

    def __init__(self, base: BaseModel, *, tokens_per_batch: int = 8192, max_batch: int = 16) -> None:
        self.fingerprint = base.fingerprint
        self._base = base
        self._tokens_per_batch = tokens_per_batch
        self._max_batch = max_batch
        self._context = int(getattr(base.model.config, "max_position_embeddings", 0) or 1 << 30)
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
        results: list[str | GenerationError] = [""] * len(prompts)
        rows: list[_Row] = []
        for index, prompt in enumerate(prompts):
            ids, limit = self._prompt_ids(prompt), prompt.limit(max_new_tokens)
            if len(ids) + limit > self._context:
                results[index] = PromptTooLongError(
                    f"a prompt of {len(ids)} tokens and {limit} new ones exceed the context of {self._context}",
                    "split the passage (corpus.max_words), or use a model with a longer context",
                )
            else:
                rows.append(_Row(index, ids, limit, prompt.stop))
        shared, cache = self._shared_prefix([row.ids[:-1] for row in rows])
        for batch in self._batches(rows, shared):
            for row, text in zip(batch, self._decode(batch, shared, cache, temperature, top_k, seed), strict=True):
                results[row.index] = text
        return results

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the mean log-probability of each second text after its first; see `Scorer`."""
        results = [float("-inf")] * len(pairs)
        rows: list[_Row] = []
        for index, (before, text) in enumerate(pairs):
            ids, target = self._text_ids(before), self._encode(text)
            if ids and target and len(ids) + len(target) <= self._context:
                rows.append(_Row(index, ids + target, len(target), ""))
        shared, cache = self._shared_prefix([row.ids[: -row.limit - 1] for row in rows])
        for batch in self._batches(rows, shared):
            for row, mean in zip(batch, self._mean_log_probabilities(batch, shared, cache), strict=True):
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

    def _batches(self, rows: list[_Row], shared: int) -> Iterator[list[_Row]]:
        """Yield the rows, longest first, in batches whose padded tokens keep to the budget."""
        batch: list[_Row] = []
        width = 0
        for row in sorted(rows, key=lambda row: (-len(row.ids), -row.limit, row.index)):
            width = max(width, len(row.ids) + row.limit)
            full = len(batch) == self._max_batch or width * (len(batch) + 1) > self._tokens_per_batch
            if batch and full:
                yield batch
                batch, width = [], len(row.ids) + row.limit
            batch.append(row)
        if batch:
            yield batch

    def _shared_prefix(self, rows: list[list[int]]) -> tuple[int, Any]:
        """Return how many first tokens all rows share, and their key-value cache; 0 when it does not pay."""
        import torch

        if len(rows) < 2:
            return 0, None
        low, high = min(rows), max(rows)
        shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        if shared < _SHORTEST_SHARED_PREFIX:
            return 0, None
        with torch.inference_mode():
            ids = torch.tensor([low[:shared]], device=self._base.device)
            output = self._base.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return shared, output.cache

    def _prefill(self, batch: list[_Row], shared: int, cache: Any, keep: int) -> tuple[Any, Any, Any]:
        """Run the left-padded rows after the shared prefix: the last `keep` logits, the cache, the mask."""
        import torch

        device = self._base.device
        width = max(len(row.ids) for row in batch) - shared
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        # The mask covers prefix, padding and row: the padding lies between the prefix and the row.
        mask = torch.zeros(len(batch), shared + width, dtype=torch.long)
        mask[:, :shared] = 1
        for i, row in enumerate(batch):
            length = len(row.ids) - shared
            ids[i, width - length :] = torch.tensor(row.ids[shared:])
            mask[i, shared + width - length :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(batch))
        output = self._base.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            cache=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits, output.cache, mask.to(device)

    def _decode(
        self, batch: list[_Row], shared: int, cache: Any, temperature: float, top_k: int, seed: int
    ) -> list[str]:
        import torch

        tokenizer = self._base.tokenizer
        generators = [torch.Generator().manual_seed(_row_seed(seed, row.ids)) for row in batch]
        made: list[list[int]] = [[] for _ in batch]
        alive = list(range(len(batch)))
        with torch.inference_mode():
            logits, cache, mask = self._prefill(batch, shared, cache, 1)
            while True:
                # 1. One token a row; a row ends at an end token, at its stop string or at its limit.
                tokens = _pick(logits[:, -1].float(), temperature, top_k, [generators[i] for i in alive])
                going = []
                for place, (i, token) in enumerate(zip(alive, tokens, strict=True)):
                    if token in self._stop_ids:
                        continue
                    made[i].append(token)
                    stop = batch[i].stop
                    stopped = stop and stop in tokenizer.decode(made[i][-_STOP_WINDOW:])
                    if not stopped and len(made[i]) < batch[i].limit:
                        going.append(place)
                if not going:
                    break
                # 2. Ended rows leave the batch: the others run on without them.
                if len(going) < len(alive):
                    kept = torch.tensor(going, device=mask.device)
                    cache.batch_select_indices(kept)
                    mask = mask[kept]
                    alive = [alive[place] for place in going]
                # 3. The next step sees one column more.
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                ids = torch.tensor([[made[i][-1]] for i in alive], device=mask.device)
                output = self._base.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    cache=cache,
                    use_cache=True,
                )
                logits = output.logits
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
        return [text.split(row.stop)[0] if row.stop else text for row, text in zip(batch, texts, strict=True)]

    def _mean_log_probabilities(self, batch: list[_Row], shared: int, cache: Any) -> list[float]:
        import torch

        longest = max(row.limit for row in batch)
        with torch.inference_mode():
            logits, _, _ = self._prefill(batch, shared, cache, longest + 1)
            means = []
            for i, row in enumerate(batch):
                # The logits at a position are about the token after it.
                table = logits[i, -row.limit - 1 : -1].float().log_softmax(-1)
                target = torch.tensor(row.ids[-row.limit :], device=table.device)
                means.append(float(table.gather(1, target[:, None]).mean()))
        return means


@dataclass(frozen=True, slots=True)
class _Row:
    """The token ids of one prompt, its place in the call, and how many tokens it asks for (or scores)."""

    index: int
    ids: list[int]
    limit: int
    stop: str


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _pick(logits: Any, temperature: float, top_k: int, generators: Sequence[Any]) -> list[int]:
    """Return one token a row of `logits` [rows, vocabulary]."""
    import torch

    if temperature <= 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    values, tokens = logits.topk(top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1], dim=-1)
    shares = (values / temperature).softmax(-1).cpu()
    drawn = [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(shares, generators, strict=True)
    ]
    return [int(tokens[i, place]) for i, place in enumerate(drawn)]
