"""The cross entropy over a large vocabulary, a chunk of positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Positions whose vocabulary scores exist at one time: the whole `[tokens, vocabulary]` in fp32 is gigabytes.
_LOSS_CHUNK = 256


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy over the vocabulary, a chunk of positions at a time.

    The gradient is computed in the forward pass, while a chunk's scores are at hand; the head's weight is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Take hidden `[N, H]`, head `[V, H]`, targets, weights `[N]`; give the weighted sum, losses `[N]`.

        With `softcap` c the scores are c·tanh(scores / c), as in Gemma 2.
        """
        gradient = torch.empty_like(hidden)
        losses = torch.empty_like(token_weights)
        for begin in range(0, len(hidden), _LOSS_CHUNK):
            part = slice(begin, begin + _LOSS_CHUNK)
            scores = (hidden[part] @ head.T).to(token_weights.dtype)
            squashed = None
            if softcap is not None:
                squashed = scores.div_(softcap).tanh_()
                scores = softcap * squashed
            normalizer = scores.logsumexp(dim=-1, keepdim=True)
            target = targets[part, None]
            losses[part] = (normalizer - scores.gather(1, target))[:, 0]
            probabilities = scores.sub_(normalizer).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
            probabilities.mul_(token_weights[part, None])
            if squashed is not None:
                probabilities.mul_(1 - squashed.square())
            gradient[part] = probabilities.to(hidden.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient by the sum's."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None
