"""Choosing the next token of each row: the likeliest, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A temperature below it is 0: dividing by it would leave the range of a float.
_COLDEST = 1e-5
# What stands for the token of a row whose logits are not finite.
NO_TOKEN = -1


@dataclass(frozen=True)
class Sampler:
    """How one row's tokens are drawn, by a random generator of its own.

    `top_k` 0 stands for all tokens; `top_p` 1 as well.
    """

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator


def make_sampler(prompt: Sequence[int], *, temperature: float, top_k: int, top_p: float, seed: int) -> Sampler | None:
    """Return the sampler of a row; None where the temperature is 0, and the likeliest token is taken."""
    if temperature <= _COLDEST:
        return None
    generator = torch.Generator().manual_seed(_row_seed(seed, prompt))
    return Sampler(temperature, top_k, top_p, generator)


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(f"{seed}:{','.join(map(str, ids))}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def pick_tokens(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int]:
    """Return one token a row of `logits` `[rows, vocabulary]`: the likeliest, or drawn by the row's own sampler.

    It is `NO_TOKEN` where the logits are not finite.
    """
    best, tokens = logits.max(-1)
    by_count: dict[int, list[int]] = {}
    drawing = {row: sampler for row, sampler in enumerate(samplers) if sampler is not None}
    for row, sampler in drawing.items():
        by_count.setdefault(min(sampler.top_k or logits.shape[-1], logits.shape[-1]), []).append(row)
    # Rows with the same `top_k` together: which of two equal logits comes first may depend on it.
    for count, rows in by_count.items():
        values, candidates = logits[rows].float().topk(count)
        drawn = [_draw(largest, drawing[row]) for largest, row in zip(values.cpu(), rows, strict=True)]
        tokens[rows] = candidates.gather(1, torch.stack(drawn).to(candidates.device))[:, 0]
    picked: list[int] = torch.where(best.isfinite(), tokens, NO_TOKEN).tolist()
    return picked


def _draw(values: Tensor, sampler: Sampler) -> Tensor:
    """Draw one index `[1]` into the logits `values` `[n]`, which are sorted from high to low."""
    if not values[0].isfinite():
        return torch.zeros(1, dtype=torch.long)
    shares = (values / sampler.temperature).softmax(-1)
    if sampler.top_p < 1:
        shares = shares * (shares.cumsum(-1) - shares < sampler.top_p)
    return torch.multinomial(shares, 1, generator=sampler.generator)
