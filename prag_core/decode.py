"""Greedy decoding of a batch in which each row has its own adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prag_core.lora import Injector, RowAdapters
from prag_core.models import BaseModel


@dataclass(frozen=True)
class Decoded:
    """The new tokens of each row, and the milliseconds that prefill and decoding took for the whole batch."""

    tokens: list[list[int]]
    prefill_ms: float
    decode_ms: float


def greedy(
    base: BaseModel,
    injector: Injector,
    prompts: Sequence[Sequence[int]],
    rows: RowAdapters | None,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Decoded:
    """Continue each prompt by its likeliest tokens until a stop token (not returned) or `max_new_tokens`.

    Args:
        base: The frozen model.
        injector: Its hooks; the recipe's layout fits `rows`.
        prompts: Token ids, one list a row; padded on the left here.
        rows: The adapters of each row, or None for the bare model.
        max_new_tokens: The most tokens a row may add.
        stop_ids: Tokens that end a row.
    """
    device = base.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    made: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    begun = time.perf_counter()
    prefilled = None
    cache = None
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            with injector.active(rows):
                output = base.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = output.cache
            tokens = output.logits[:, -1].argmax(-1).tolist()
            prefilled = prefilled or time.perf_counter()
            going = [place for place, token in enumerate(tokens) if token not in stop_ids]
            for place in going:
                made[alive[place]].append(tokens[place])
            if not going:
                break
            # Rows that ended leave the batch, and their adapters with them.
            if len(going) < len(alive):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                mask, rows = mask[kept], _select(rows, kept)
                alive = [alive[place] for place in going]
            ids = torch.tensor([[made[i][-1]] for i in alive], device=device)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
    ended = time.perf_counter()
    prefilled = prefilled or ended
    return Decoded(made, (prefilled - begun) * 1e3, (ended - prefilled) * 1e3)


def _select(rows: RowAdapters | None, kept: torch.Tensor) -> RowAdapters | None:
    if rows is None:
        return None
    factors = {place: (a[kept], b[kept]) for place, (a, b) in rows.factors.items()}
    return replace(rows, factors=factors, weights=rows.weights[kept])
