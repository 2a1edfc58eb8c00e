"""Choosing the next token of each row: the most likely one, or one sampled by temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
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
    """How to sample one row's tokens, with a random generator of its own; `top_k` 0 and `top_p` 1 allow all tokens."""

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator


def make_sampler(prompt: Sequence[int], *, temperature: float, top_k: int, top_p: float, seed: int) -> Sampler | None:
    """Return the sampler of a row; None for temperature 0, where the most likely token is taken."""
    if temperature <= _MIN_TEMPERATURE:
        return None
    generator = torch.Generator().manual_seed(_row_seed(seed, prompt))
    return Sampler(temperature, top_k, top_p, generator)


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def pick_tokens(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int]:
    """Return one token for each row of `logits` `[rows, vocabulary]`, chosen by the row's sampler.

    Without a sampler it is the most likely token, and with logits that are not finite it is `NO_TOKEN`.
    """
    best, tokens = logits.max(-1)
    rows_by_k: dict[int, list[int]] = {}
    sampled = {row: sampler for row, sampler in enumerate(samplers) if sampler is not None}
    for row, sampler in sampled.items():
        rows_by_k.setdefault(min(sampler.top_k or logits.shape[-1], logits.shape[-1]), []).append(row)
    # One `topk` for each k: the order of equal logits may depend on k, and must not depend on the neighbours' k.
    for k, rows in rows_by_k.items():
        values, candidates = logits[rows].float().topk(k)
        drawn = [_draw(largest, sampled[row]) for largest, row in zip(values.cpu(), rows, strict=True)]
        tokens[rows] = candidates.gather(1, torch.stack(drawn).to(candidates.device))[:, 0]
    picked: list[int] = torch.where(best.isfinite(), tokens, NO_TOKEN).tolist()
    return picked


def _draw(values: Tensor, sampler: Sampler) -> Tensor:
    """Sample one index, an int64 tensor `[1]`, from the logits `values` `[k]`, which are sorted from high to low."""
    if not values[0].isfinite():
        return torch.zeros(1, dtype=torch.long)
    probabilities = (values / sampler.temperature).softmax(-1)
    if sampler.top_p < 1:
        # The most likely token stays, even if `top_p` is less than the smallest number of the tensor's type.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * ((before < sampler.top_p) | (before <= 0))
    return torch.multinomial(probabilities, 1, generator=sampler.generator)
