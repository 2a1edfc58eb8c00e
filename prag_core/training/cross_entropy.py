"""Cross entropy over a large vocabulary, computed for a chunk of positions at a time to save memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Positions whose logits are in memory at one time; all of `[tokens, vocabulary]` in fp32 would be gigabytes. A CPU
# gains nothing from more. A GPU does: fewer kernels, and products that fill it. 128,256 scores of 1,046 positions are
# half a gigabyte.
_CPU_CHUNK = 256
_CHUNK_SCORES = 2**27


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
        chunk = _CPU_CHUNK if hidden.device.type == "cpu" else max(_CPU_CHUNK, _CHUNK_SCORES // len(head))
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            logits = (hidden[part] @ head.T).to(token_weights.dtype)
            squashed = None
            if softcap is not None:
                squashed = logits.div_(softcap).tanh_()
                logits = softcap * squashed
            logits = logits.log_softmax(dim=-1)
            target = targets[part, None]
            of_target = logits.gather(1, target)
            losses[part] = -of_target[:, 0]
            # The gradient of the logits: softmax − one-hot target, times tanh's derivative. It is written in the
            # model's dtype. At the target it may be near zero, so there it is computed apart.
            slope = torch.exp(logits, out=torch.empty_like(logits, dtype=hidden.dtype if squashed is None else None))
            slope.scatter_(1, target, of_target.expm1().to(slope.dtype))
            if squashed is not None:
                slope.mul_(1 - squashed.square())
            torch.mm(slope.to(hidden.dtype), head, out=gradient[part])
        gradient.mul_(token_weights[:, None].to(hidden.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradient times the gradient of the weighted sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None
