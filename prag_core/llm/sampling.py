"""Choosing the next token of each row: the most likely one, or one sampled by temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Lower temperatures count as 0: logits divided by them would overflow.
_MIN_TEMPERATURE = 1e-5
# The token of a row whose logits are not finite.
NO_TOKEN = -1


@dataclass(frozen=True)
class Sampler:
    """How to sample one row's tokens, with random numbers of its own; `top_k` 0 and `top_p` 1 allow all tokens."""

    temperature: float
    top_k: int
    top_p: float
    numbers: random.Random


def make_sampler(prompt: Sequence[int], *, temperature: float, top_k: int, top_p: float, seed: int) -> Sampler | None:
    """Return the sampler of a row; None for temperature 0, where the most likely token is taken."""
    if temperature <= _MIN_TEMPERATURE:
        return None
    # Python keeps the numbers of a seed from one version to the next, and makes them without a tensor.
    return Sampler(temperature, top_k, top_p, random.Random(_row_seed(seed, prompt)))


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def pick_tokens(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int]:
    """Return one token for each row of `logits` `[rows, vocabulary]`, chosen by the row's sampler.

    Without a sampler it is the most likely token, and with logits that are not finite it is `NO_TOKEN`.
    """
    best, tokens = logits.max(-1)
    sampled = {row: sampler for row, sampler in enumerate(samplers) if sampler is not None}
    # Apart, since one needs no order of the vocabulary, one some tokens of it, and one all.
    every = [row for row, sampler in sampled.items() if not sampler.top_k and sampler.top_p == 1]
    few = [row for row, sampler in sampled.items() if sampler.top_k]
    rest = [row for row, sampler in sampled.items() if not sampler.top_k and sampler.top_p < 1]
    for rows in (every, few, rest):
        if rows:
            tokens[rows] = _draw(logits[rows].float(), [sampled[row] for row in rows], ordered=rows is not every)
    picked: list[int] = torch.where(best.isfinite(), tokens, NO_TOKEN).tolist()
    return picked


def _draw(logits: Tensor, samplers: Sequence[Sampler], *, ordered: bool) -> Tensor:
    """Sample one token for each row of `logits` `[rows, vocabulary]`, fp32; returns their ids, int64 `[rows]`.

    A row draws one number, and takes the first token at which the sum of the probabilities exceeds it. They are summed
    in the order of the vocabulary, or from the most likely token on where `top_k` or `top_p` limit them (`ordered`). So
    a draw depends neither on how a device orders equal logits nor on the other rows.
    """
    size = logits.shape[-1]
    top_k = [min(s.top_k or size, size) for s in samplers]
    # Drawn on the host, and copied to the device with the settings, all at once.
    numbers = [[s.temperature, s.numbers.random(), k, s.top_p] for s, k in zip(samplers, top_k, strict=True)]
    temperature, drawn, k, top_p = torch.tensor(numbers, dtype=torch.float64).to(logits.device).T[:, :, None]
    ids = _most_likely(logits, max(top_k)) if ordered else None
    scaled = (logits if ids is None else logits.gather(1, ids)) / temperature.float()
    if ids is not None:
        scaled.masked_fill_(torch.arange(ids.shape[1], device=ids.device) >= k, -torch.inf)
    # In fp64, in which a sum over a vocabulary differs too little between devices to move a draw.
    probabilities = scaled.softmax(-1).double()
    if ids is not None:
        before = probabilities.cumsum(-1) - probabilities
        # The most likely token stays, even if `top_p` is less than the smallest number.
        probabilities.masked_fill_((before >= top_p) & (before > 0) & (top_p < 1), 0.0)
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
    # A row that is not finite has no such token; its caller says so, and any token within the vocabulary will do.
    index.clamp_(max=sums.shape[1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the largest of `logits` `[rows, vocabulary]`, fp32, from the largest on, int64 `[rows, count]`.

    Of equal logits those with lower ids come first, on every device.
    """
    size = logits.shape[-1]
    if count == size:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    # `topk` may take any of those that equal the smallest one, and returns equal ones in any order. So take those above
    # it, then its equals from the lowest id on, and put these few in order. The ranks are exact as fp32.
    smallest = logits.topk(count).values[:, -1:]
    rank = torch.arange(size, 0, -1, dtype=torch.float32, device=logits.device)
    rank = torch.where(logits > smallest, rank + size, torch.where(logits == smallest, rank, 0))
    ids = size - (rank.topk(count).values.long() - 1) % size - 1
    return ids.gather(1, logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices)
