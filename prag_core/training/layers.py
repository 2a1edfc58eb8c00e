"""The frozen model's layers as training computes them: the same results in fewer passes over memory.

transformers writes a layer as a chain of small operators, and autograd keeps what each of them read. Here a gated
feed-forward network with its adapters is one operator, which keeps its input, gate and up and computes the rest again
in the backward pass. A root-mean-square norm is torch's own, one kernel on CUDA. Attention needs no mask, since the
padding is on the right.

Rows of different lengths can be packed: their tokens one after the other, as one row without padding. Then the frozen
weights see no padding; only attention and the products with the factors do, which are a small part of a step.

A module is replaced only if its class's code is one that is known here; any other stays as it is, with the injector's
hooks. Outside of `active`, and after `close`, the model computes as before.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prag_core.llm.layout import place_of
from prag_core.llm.lora import Injector, RowAdapters

_ATTENTION = "prag_causal"
# On a CPU in bf16, torch's attention takes twice as long as plain products on 240 tokens, and six times on 40. Their
# memory grows with the square.
_FEW_TOKENS = 512
_TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Packing:
    """Where the N tokens of packed rows belong in the padded rows `[rows, T]`.

    `places` `[N]` are indices in the flattened padded rows. The tokens of a row are one after the other.
    """

    rows: int
    length: int
    places: Tensor

    def pad(self, tokens: Tensor) -> Tensor:
        """Return the padded rows `[rows, T, …]` of tokens `[N, …]`, with zeros for padding."""
        padded = tokens.new_zeros(self.rows * self.length, *tokens.shape[1:])
        return padded.index_copy_(0, self.places, tokens).view(self.rows, self.length, *tokens.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """Return the tokens `[N, …]` of padded rows `[rows, T, …]`."""
        return padded.flatten(0, 1).index_select(0, self.places)


# transformers calls an attention by its name, and has no argument for this.
_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


class _FeedForward:
    """The code of a feed-forward network that is replaced: Llama's, Mistral's, Qwen's and Gemma's."""

    down_proj: Any
    act_fn: Any
    gate_proj: Any
    up_proj: Any

    def forward(self, x: Tensor) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504  (the same instructions as in transformers)


class _Norm:
    """The code of a norm that is replaced: Llama's, Mistral's, Qwen's and Phi-3's."""

    weight: Any
    variance_epsilon: Any

    def forward(self, hidden_states: Tensor) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def _computes(module: nn.Module, known: Callable[..., Any]) -> bool:
    """Return whether a module's forward consists of the same instructions as a known one."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or not isinstance(known, FunctionType):
        return False
    codes = (forward.__code__, known.__code__)
    left, right = ((code.co_code, code.co_names, code.co_consts) for code in codes)
    return left == right


class TrainingLayers:
    """Replaces layers of a model by the operators of this module, for the rows that an injector has active.

    Args:
        model: The frozen model.
        injector: Holds the active adapters, whose B includes their scale (`weights` is None).
    """

    def __init__(self, model: Any, injector: Injector) -> None:
        self._injector = injector
        self._config = model.get_decoder().config
        layout = injector.layout
        self._replaced: list[tuple[nn.Module, Any]] = []
        fused = 0
        for name, module in model.named_modules():
            if _computes(module, _Norm.forward):
                self._replace(module, self._norm(module))
            elif _computes(module, _FeedForward.forward):
                place = place_of(f"{name}.gate_proj")
                if place is not None and place[0] in layout.layers and set(_TARGETS) <= set(layout.targets):
                    self._replace(module, self._feed_forward(module, place[0]))
                    fused += 1
        kinds = set(getattr(self._config, "layer_types", None) or ["full_attention"])
        # Other kinds of layers, capped scores, and other implementations than torch's need what transformers does for
        # them.
        self._maskless = (
            kinds <= {"full_attention", "sliding_attention"}
            and getattr(self._config, "attn_logit_softcapping", None) is None
            and self._config._attn_implementation == "sdpa"
        )
        AttentionInterface.register(_ATTENTION, causal_attention)
        # The injector's hooks, and attention with a mask, need padded rows.
        self.can_pack = (
            self._maskless
            and set(layout.targets) == set(_TARGETS)
            and fused == len(layout.layers)
            and "position_ids" in inspect.signature(model.get_decoder().forward).parameters
        )

    @contextlib.contextmanager
    def active(self, rows: RowAdapters | None, packing: Packing | None = None) -> Iterator[None]:
        """Train these rows' adapters in the forward passes within this context.

        With `packing` the model gets the tokens of all rows as one row, and each token's position in its own row as
        `position_ids`. Only where `can_pack` is true.
        """
        before = self._config._attn_implementation
        if self._maskless:
            # transformers makes no mask for an attention that it does not know. For its own it reads from the device
            # whether rows are packed, and the host waits.
            self._config._attn_implementation = _ATTENTION
        token = _packing.set(packing)
        try:
            with self._injector.active(rows):
                yield
        finally:
            _packing.reset(token)
            self._config._attn_implementation = before

    def recompute_contexts(self) -> tuple[Any, Any]:
        """Return a `context_fn` pair for `torch.utils.checkpoint`, which keeps the active adapters for recomputation.

        On CUDA the backward pass runs in a thread of autograd, which does not see the caller's context.
        """
        return contextlib.nullcontext(), self.active(self._injector.rows, _packing.get())

    def close(self) -> None:
        """Give the modules their own code again."""
        for module, before in self._replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._replaced = []

    def _replace(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def _norm(self, module: Any) -> Callable[[Tensor], Tensor]:
        own = module.forward

        def norm(x: Tensor) -> Tensor:
            if self._injector.rows is None:
                return own(x)  # type: ignore[no-any-return]
            return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)

        return norm

    def _feed_forward(self, module: Any, layer: int) -> Callable[[Tensor], Tensor]:
        own = module.forward

        def feed_forward(x: Tensor) -> Tensor:
            rows = self._injector.rows
            if rows is None:
                return own(x)  # type: ignore[no-any-return]
            factors = [factor for target in _TARGETS for factor in rows.factors[layer, target]]
            return GatedFeedForward.apply(x, module, _packing.get(), *factors)  # type: ignore[no-untyped-call,no-any-return]

        return feed_forward


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend to all tokens before, or to those of the layer's sliding window.

    `query` is `[rows, heads, T, d]`; there may be fewer heads of keys and values. Returns `[rows, T, heads, d]`.
    Packed rows, `[1, heads, N, d]`, are padded here, and packed again: returns `[1, N, heads, d]`.
    """
    packing = _packing.get()
    if packing is None:
        return _padded_attention(module, query, key, value, attention_mask, **options), None
    pad: Callable[[Tensor, Packing], Tensor] = _Pad.apply
    pack: Callable[[Tensor, Packing], Tensor] = _Pack.apply
    query, key, value = (pad(x[0].transpose(0, 1), packing).transpose(1, 2) for x in (query, key, value))
    return pack(_padded_attention(module, query, key, value, attention_mask, **options), packing)[None], None


class _Pad(torch.autograd.Function):
    """`Packing.pad`, whose gradient is `pack`: without the sum that autograd makes of an `index_select`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.pad(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.pack(gradients[0]), None


class _Pack(torch.autograd.Function):
    """`Packing.pack`, whose gradient is `pad`."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.pack(padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.pad(gradients[0]), None


def _padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Tensor:
    window, length = options.get("sliding_window"), query.shape[2]
    if window is not None and length > window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril().triu(1 - window)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= _FEW_TOKENS:
        return _as_products(query, key, value, attention_mask, options["scaling"])
    attended: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return attended


def _as_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    rows, heads, length, size = query.shape
    # The heads that share a head of keys are one long row.
    shared = heads // key.shape[1]
    queries = (query * scaling).reshape(-1, shared * length, size)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    bias = torch.zeros(length, length, dtype=query.dtype).masked_fill_(~mask, -torch.inf).repeat(shared, 1)
    scores = torch.baddbmm(bias.expand(len(queries), -1, -1), queries, key.flatten(0, 1).transpose(1, 2))
    attended = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return attended.view(rows, heads, length, size).transpose(1, 2)


class GatedFeedForward(torch.autograd.Function):
    """`down(act(gate(x)) · up(x))` with an adapter of each row in each of the three linear modules.

    The weights are frozen. Kept for the backward pass are x, gate, up and what is as small as the factors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, packing: Packing | None, *factors: Tensor) -> Tensor:
        """Return the output `[rows, T, H]` for x `[rows, T, H]`, or for packed rows the output `[1, N, H]`.

        `factors` are A `[R, r, inputs]` and the transpose of B `[R, r, outputs]`, times the scale, of gate, up and
        down. `rows` is a multiple of R: each adapter has as many rows, one after the other.
        """
        a_gate, b_gate, a_up, b_up, a_down, b_down = factors
        gate, up = _linear(module.gate_proj, x), _linear(module.up_proj, x)
        # One pass over x for both.
        a_in = torch.cat([a_gate, a_up], 1)
        low = torch.bmm(_per_adapter(x, a_in, packing), a_in.transpose(1, 2))
        low_gate, low_up = torch.split(low, a_gate.shape[1], 2)
        _add(gate, low_gate, b_gate, packing)
        _add(up, low_up, b_up, packing)
        product = module.act_fn(gate) * up
        output = _linear(module.down_proj, product)
        low_down = torch.bmm(_per_adapter(product, a_down, packing), a_down.transpose(1, 2))
        _add(output, low_down, b_down, packing)
        ctx.module, ctx.packing = module, packing
        ctx.save_for_backward(x, gate, up, low, low_down, a_in, b_gate, b_up, a_down, b_down)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors."""
        x, gate, up, low, low_down, a_in, b_gate, b_up, a_down, b_down = ctx.saved_tensors
        gradient, module, packing = gradients[0], ctx.module, ctx.packing
        # 1. Down. Its input is computed again.
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = module.act_fn(leaf)
        product = activated.detach() * up
        d_output = _per_adapter(gradient, b_down, packing)
        d_low_down = torch.bmm(d_output, b_down.transpose(1, 2))
        d_b_down = torch.bmm(low_down.transpose(1, 2), d_output)
        d_a_down = torch.bmm(d_low_down.transpose(1, 2), _per_adapter(product, a_down, packing))
        d_product = gradient @ module.down_proj.weight
        _add(d_product, d_low_down, a_down, packing)
        # 2. The gate.
        d_up = d_product * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, leaf, d_product.mul_(up))
        # 3. Gate and up.
        d_gates, d_ups = _per_adapter(d_gate, b_gate, packing), _per_adapter(d_up, b_up, packing)
        d_low = torch.cat([torch.bmm(d_gates, b_gate.transpose(1, 2)), torch.bmm(d_ups, b_up.transpose(1, 2))], 2)
        rank = b_gate.shape[1]
        d_b_gate = torch.bmm(low[..., :rank].transpose(1, 2), d_gates)
        d_b_up = torch.bmm(low[..., rank:].transpose(1, 2), d_ups)
        d_a_gate, d_a_up = torch.split(torch.bmm(d_low.transpose(1, 2), _per_adapter(x, a_in, packing)), rank, 1)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_gate @ module.gate_proj.weight
            d_x.flatten(0, 1).addmm_(d_up.flatten(0, 1), module.up_proj.weight)
            _add(d_x, d_low, a_in, packing)
        return d_x, None, None, d_a_gate, d_b_gate, d_a_up, d_b_up, d_a_down, d_b_down


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear module without its hooks."""
    return functional.linear(x, module.weight, module.bias)


def _per_adapter(x: Tensor, factor: Tensor, packing: Packing | None) -> Tensor:
    """Return the rows of each adapter as one long row: `[n · R, T, size]` → `[R, n · T, size]`; packed rows padded."""
    if packing is not None:
        x = packing.pad(x[0])
    return x.view(len(factor), -1, x.shape[-1])


def _add(output: Tensor, low: Tensor, factor: Tensor, packing: Packing | None) -> None:
    """Add the products of `low` `[R, n · T, r]` and a factor `[R, r, size]` to the rows of each adapter, in place."""
    if packing is None:
        _per_adapter(output, factor, None).baddbmm_(low, factor)
    else:
        output[0].add_(torch.bmm(low, factor).flatten(0, 1).index_select(0, packing.places))
