"""A faster linear layer for few rows on a CPU: it computes (W·xᵀ)ᵀ in place of x·Wᵀ where that takes less time.

A decoding step multiplies one row for each sequence. For which numbers of rows W·xᵀ is faster depends on the library
that computes it, and so on the dtype and the processor (decisions 65 and 102 in docs/decisions).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def few_rows(dtype: torch.dtype, inputs: int) -> range:
    """Return the numbers of rows for which this processor is faster with W·xᵀ, for W `[outputs, inputs]`."""
    if dtype == torch.float32:
        # MKL. One row has a fast kernel of its own. Beyond 64, only the output layer gains.
        return range(2, 65)
    if dtype != torch.bfloat16 or inputs < 1536:
        return range(0)
    if torch.cpu._is_amx_tile_supported():
        return range(1, 65)
    # oneDNN takes as long for W·xᵀ with 2 rows as with 16. Of x·Wᵀ, each row has its price.
    return range(16, 49) if torch.cpu._is_avx512_bf16_supported() else range(0)


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` without a bias that is fast for the numbers of rows in `rows`."""

    rows = range(0)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`; the result differs from `nn.Linear` by rounding only."""
        count = input.numel() // self.in_features
        if count not in self.rows:
            return functional.linear(input, self.weight)
        output = (self.weight @ input.reshape(count, self.in_features).T).T
        if output.dtype == torch.bfloat16:
            # Stored by columns, it would keep attention and later products from their fast kernels.
            output = output.contiguous()
        return output.reshape(*input.shape[:-1], self.out_features)


def use_few_rows(model: nn.Module) -> None:
    """Turn the linear modules of a model on a CPU into `FewRowsLinear` where that gains; weights and hooks stay.

    Modules with a bias and subclasses of `nn.Linear` are left as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and module.weight.device.type == "cpu":
            rows = few_rows(module.weight.dtype, module.in_features)
            if rows:
                module.__class__ = FewRowsLinear
                module.rows = rows
