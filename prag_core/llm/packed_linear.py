"""A faster linear layer for decoding on a CPU: it multiplies by a copy of its weights in the processor's own layout.

A decoding step multiplies one row for each sequence, so reading the weights is most of its work. oneDNN reads them
faster in blocks that fit the processor's registers (decision 114 in docs/decisions). torch has this as the operators
with which its compiler freezes weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# oneDNN chooses the layout for a number of rows. The one for many rows was as fast as any for few of them.
_ROWS = 128


class PackedLinear(nn.Linear):
    """An `nn.Linear` without a bias that packs its weights when it is first used in inference mode.

    The copy takes as many bytes as the weights, which stay for training and for who reads them.
    """

    _packed: Tensor | None = None
    _packed_version = -1

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`; the result differs from `nn.Linear` by rounding only."""
        if not torch.is_inference_mode_enabled() or not input.numel():
            return functional.linear(input, self.weight)
        # Weights that somebody changed, such as by merging an adapter, are packed again.
        if self._packed is None or self._packed_version != self.weight._version:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
            self._packed_version = self.weight._version
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, None, "none", [], "")
        return packed


def pack_linear(model: nn.Module) -> None:
    """Turn the linear modules of a model on a CPU into `PackedLinear`; weights and hooks stay.

    Modules with a bias, subclasses of `nn.Linear` and dtypes that the processor does not multiply are left as they are.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    plain = (module for module in model.modules() if type(module) is nn.Linear and module.bias is None)
    for module in plain:
        if module.weight.device.type == "cpu" and module.weight.dtype in dtypes:
            module.__class__ = PackedLinear
