"""A linear module whose products of few rows are computed the other way round on a CPU: (W·xᵀ)ᵀ instead of x·Wᵀ.

A decoding step multiplies one row a sequence. For 2 to 64 rows the CPU library's kernel for x·Wᵀ took 1.2 to 4 times as
long in fp32 as the one for W·xᵀ, which reads the weights along their rows (docs/decisions.md, 65).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Below, there is a kernel for a matrix and a vector; above, little or nothing is gained, but for the output layer.
FEW_ROWS = range(2, 65)


class FewRowsLinear(nn.Linear):
    """`nn.Linear` without a bias, for inputs `[..., inputs]` of which few are given at once."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., outputs]`: the same product, its sums rounded in another order."""
        rows = input.numel() // self.in_features
        if rows not in FEW_ROWS:
            return functional.linear(input, self.weight)
        turned = self.weight @ input.reshape(rows, self.in_features).T
        return turned.T.reshape(*input.shape[:-1], self.out_features)


def use_few_rows(model: nn.Module) -> None:
    """Make the plain linear modules of an fp32 model on a CPU `FewRowsLinear`; their weights and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            weight = module.weight
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                module.__class__ = FewRowsLinear
