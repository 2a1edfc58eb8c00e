"""A faster linear layer for few rows: for 2 to 64 rows on a CPU, compute (W·xᵀ)ᵀ; MKL is faster there.

A decoding step multiplies one row for each sequence. For so few rows MKL's fp32 kernel for x·Wᵀ takes 1.2 to 4 times as
long as the one for W·xᵀ, which reads the weights along their rows (decision 65 in docs/decisions).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# One row has a fast matrix-vector kernel. Beyond 64 rows little or nothing is gained, except in the output layer.
FEW_ROWS = range(2, 65)


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` without a bias that is fast for few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`; the result differs from `nn.Linear` by rounding only."""
        rows = input.numel() // self.in_features
        if rows not in FEW_ROWS:
            return functional.linear(input, self.weight)
        transposed = self.weight @ input.reshape(rows, self.in_features).T
        return transposed.T.reshape(*input.shape[:-1], self.out_features)


def use_few_rows(model: nn.Module) -> None:
    """Turn the linear modules of an fp32 model on a CPU into `FewRowsLinear`; weights and hooks stay.

    Modules with a bias and subclasses of `nn.Linear` are left as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            weight = module.weight
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                module.__class__ = FewRowsLinear
