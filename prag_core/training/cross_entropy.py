"""Cross entropy over a large vocabulary, computed for a chunk of positions at a time to save memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Positions whose logits are in memory at one time; all of `[tokens, vocabulary]` in fp32 would be gigabytes.
_LOSS_CHUNK = 256


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy over the vocabulary.

    The forward pass computes the gradient too, while a chunk's logits are in memory. The output layer is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the losses, and the losses `[N]`, which are not differentiable.

        The arguments are hidden states `[N, H]`, the output layer's weight `[V, H]`, the next tokens `[N]` (int64), and
        weights `[N]`, whose dtype the losses have. With `softcap` c the logits are c · tanh(logits / c), as in Gemma 2.
        """
        gradient = torch.empty_like(hidden)
        losses = torch.empty_like(token_weights)
        for begin in range(0, len(hidden), _LOSS_CHUNK):
            part = slice(begin, begin + _LOSS_CHUNK)
            logits = (hidden[part] @ head.T).to(token_weights.dtype)
            squashed = None
            if softcap is not None:
                squashed = logits.div_(softcap).tanh_()
                logits = softcap * squashed
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            target = targets[part, None]
            losses[part] = (normalizer - logits.gather(1, target))[:, 0]
            # The gradient of the logits, in place: (softmax − one-hot target) · weight, times tanh's derivative.
            slope = logits.sub_(normalizer).exp_()
            slope.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
            slope.mul_(token_weights[part, None])
            if squashed is not None:
                slope.mul_(1 - squashed.square())
            gradient[part] = slope.to(hidden.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradient times the gradient of the weighted sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None
