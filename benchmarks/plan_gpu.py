"""Predict training on a GPU without one: `python benchmarks/plan_gpu.py`.

The real trainer trains one stack on torch's meta device, which has shapes but no values. A dispatch mode counts what a
GPU would execute in one step: operators (kernels), arithmetic, bytes, waits of the host and copies from it. Hooks count
the bytes that are kept for the backward pass. A roofline turns them into time: each kernel takes as long as its
arithmetic or its bytes at the card's rates, whichever is longer. Options give the card's rates; by default they are
those that an H100 reaches in practice. Only a card can confirm the times; the counts hold as they are.

The attention, norm and optimizer that torch would choose on CUDA are chosen here too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from prag_core.llm.base_model import BaseModel
from prag_core.recipe import RECIPES
from prag_core.training.examples import TrainingExample, TrainingJob
from prag_core.training.trainer import Trainer

aten = torch.ops.aten
RECIPE = RECIPES["paper"]
# Of Llama-3.2-1B, Qwen2.5-1.5B and Llama-3-8B: (hidden, feed-forward, layers, heads, key-value heads, vocabulary), and
# whether input and output embeddings are one.
SHAPES: dict[str, tuple[Any, Any, tuple[int, ...], bool]] = {
    "1b": (LlamaConfig, LlamaForCausalLM, (2048, 8192, 16, 32, 8, 128_256), True),
    "1.5b": (Qwen2Config, Qwen2ForCausalLM, (1536, 8960, 28, 12, 2, 151_936), True),
    "8b": (LlamaConfig, LlamaForCausalLM, (4096, 14_336, 32, 32, 8, 128_256), False),
}
TINY = (32, 64, 2, 4, 2, 300)
# Tokens of a passage of 100 words over its five examples, as in `train_gpu.py`.
PASSAGE = 1010

# Operators that only make or describe memory, beside the views.
_FREE = {aten._unsafe_view, aten.detach, aten.alias, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
_FREE |= {aten.new_empty_strided, aten.lift_fresh, aten._reshape_alias, aten.view, aten.split, aten.unbind}
# A multi-tensor kernel takes 320 blocks of 65,536 elements, and some 48 tensors.
_BLOCKS, _TENSORS = 320 * 65_536, 48


@dataclass
class Kernel:
    part: str
    flops: float
    size: float
    launches: int = 1


@dataclass
class Step:
    """What was counted between two reports of the trainer."""

    kernels: list[Kernel] = field(default_factory=list)
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    saved: dict[int, int] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)


def size_of(tensor: Tensor) -> int:
    """Return the bytes that a kernel touches in a tensor; expanded dimensions are read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, stride in sizes if stride or n == 0)


class Count(TorchDispatchMode):
    """Counts in `step` what runs on the meta device; reading a value from there gives ones."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.step = Step()
        self.optimizing = False
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        packet = func._overloadpacket
        on_meta = any(t.device.type == "meta" for t in inputs)
        if packet is aten._local_scalar_dense and on_meta:
            self.step.syncs["a value read"] += 1
            return {torch.bool: True, torch.int64: 1}.get(inputs[0].dtype, 1.0)
        if packet is aten._to_copy and on_meta and str(kwargs.get("device")) == "cpu":
            self.step.syncs["a tensor read"] += not kwargs.get("non_blocking")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_ and args[0].device.type == "cpu" and on_meta:
            self.step.syncs["a tensor read"] += not (kwargs.get("non_blocking") or args[2:3] == (True,))
            return args[0].fill_(1)
        if packet in (aten.nonzero, aten.masked_select) and on_meta:
            self.step.syncs[str(packet)] += 1
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not any(t.device.type == "meta" for t in [*inputs, *outputs]):
            return out
        if packet in (aten._to_copy, aten.copy_) and any(t.device.type == "cpu" and t.dim() for t in inputs):
            self.step.copies["from the host"] += 1
        elif not (func.is_view or packet in _FREE):
            self.step.kernels.append(self._kernel(packet, args, kwargs, out, inputs, outputs))
        return out

    def _kernel(
        self, packet: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> Kernel:
        name = str(packet).removeprefix("aten.")
        counted = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}.get(packet, packet)
        flops = flop_registry[counted](*args, **kwargs, out_val=out) if counted in flop_registry else 0
        # An in-place operator returns nothing new or its argument: it is read and written.
        written = outputs or inputs
        launches = 1
        if name.startswith(("_foreach", "_fused_adam")):
            lists = [argument for argument in args if isinstance(argument, (list, tuple)) and argument]
            elements = sum(t.numel() for t in lists[0])
            launches = max(math.ceil(elements / _BLOCKS), math.ceil(len(lists[0]) / _TENSORS))
        if self.optimizing:
            part = "AdamW"
        elif any(self._vocabulary in t.shape[-2:] for t in [*inputs, *outputs]) and "embedding" not in name:
            part = "loss"
        elif "attention" in name:
            part = "attention"
        elif name in ("mm", "addmm", "addmm_"):
            part = "frozen products"
        elif "bmm" in name:
            part = "low-rank products"
        else:
            part = "norms, rotary, gates, residuals and copies"
        # These touch no more of their first argument than their indices name.
        if name in ("gather", "scatter_add_", "scatter_"):
            inputs, written = inputs[1:], inputs[1:]
        elif name in ("index_select", "embedding"):
            inputs = [*inputs[1:], *outputs]
        elif name.startswith("new_"):
            inputs = []
        return Kernel(part, flops, sum(map(size_of, inputs)) + sum(map(size_of, written)), launches)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
    """Do what `scaled_dot_product_attention` does on CUDA in bf16 without a mask."""
    if attn_mask is not None:
        raise ValueError("a mask: CUDA would not take its flash attention")
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=options["scale"])[0]


def fused_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Do what `rms_norm` does on CUDA."""
    return FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call,no-any-return]


class FusedNorm(torch.autograd.Function):
    """Two kernels, as aten::_fused_rms_norm has on CUDA. (On the meta device torch takes that apart.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rstd)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _ = ctx.saved_tensors
        return torch.add(gradients[0], x), None


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Make torch choose on the meta device what it chooses on CUDA."""
    functional, optimizer = "torch.nn.functional", "torch.optim.optimizer"
    with (
        mock.patch(f"{functional}.scaled_dot_product_attention", flash_attention),
        mock.patch(f"{functional}.rms_norm", fused_rms_norm),
        mock.patch(f"{optimizer}._get_foreach_kernels_supported_devices", return_value=["meta"]),
        mock.patch(f"{optimizer}._get_fused_kernels_supported_devices", return_value=["meta"]),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", return_value=["meta"]),
    ):
        yield


def count_step(base: BaseModel, rows: int, tokens: int) -> tuple[Step, Step]:
    """Train one stack of `rows` passages of three equally long examples; return what its second step and its end do."""
    jobs = [
        TrainingJob(str(row), tuple(TrainingExample((row, example, *range(tokens - 2))) for example in range(3)))
        for row in range(rows)
    ]
    count = Count(base.model.config.vocab_size)
    weights = {parameter.untyped_storage()._cdata for parameter in base.model.parameters()}
    steps: list[Step] = []

    def keep(tensor: Tensor) -> Tensor:
        # What a backward pass saves for itself, to recompute, is freed at once.
        storage = tensor.untyped_storage()
        if torch._C._current_graph_task_id() == -1 and tensor.device.type == "meta" and storage._cdata not in weights:
            count.step.saved[storage._cdata] = storage.nbytes()
        return tensor

    def on_step(done: int, total: int, adapters: int) -> None:
        steps.append(count.step)
        count.step = Step()

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            count.optimizing = True
            try:
                return run(*arguments, **options)
            finally:
                count.optimizing = False

        return step

    trainer = Trainer(base, RECIPE)
    with (
        as_on_cuda(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        mock.patch.object(torch.optim.AdamW, "step", watched(torch.optim.AdamW.step)),
        count,
    ):
        list(trainer.train(jobs, tokens_per_step=rows * tokens, on_step=on_step))
    trainer.close()
    return steps[1], count.step


def meta_model(name: str, smoke: bool) -> BaseModel:
    config_class, model_class, shape, tied = SHAPES[name]
    hidden, feed_forward, layers, heads, key_value_heads, vocabulary = TINY if smoke else shape
    config = config_class(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
    model.requires_grad_(False)
    return BaseModel(name, name, model.eval(), None)


def plan(base: BaseModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Count a step of as many rows as fit into the card's memory, print what it does, and return the figures."""
    parameters = sum(p.numel() for p in base.model.parameters())
    rows = arguments.rows
    step, end = count_step(base, rows, arguments.tokens)
    room = arguments.memory_gb * 0.9e9 - 2 * parameters
    if (kept := sum(step.saved.values())) > room:
        rows = max(1, int(rows * room / kept))
        step, end = count_step(base, rows, arguments.tokens)
    tokens = rows * arguments.tokens
    seconds: Counter[str] = Counter()
    for kernel in step.kernels:
        work = kernel.flops / (arguments.matrix_tflops * 1e12)
        seconds[kernel.part] += max(work, kernel.size / (arguments.memory_tb * 1e12), kernel.launches * 2e-6)
    device = seconds.total()
    host = step.launches * arguments.launch_us * 1e-6
    rate = tokens / max(device, host)
    # The model's own arithmetic: forward, and backward to the activations; its weights are frozen.
    found = {
        "rows": rows,
        "syncs": step.syncs.total(),
        "copies": step.copies.total(),
        "kernels": step.launches,
        "saved_bytes_per_token": round(sum(step.saved.values()) / tokens),
        "flop_per_token": round(sum(kernel.flops for kernel in step.kernels) / tokens),
        "passages_per_s": round(rate / PASSAGE, 1),
        "mfu": round(4 * parameters * rate / (arguments.peak_tflops * 1e12), 3),
        "shares": {part: round(time / device, 3) for part, time in seconds.most_common()},
        "device_ms": round(1e3 * device, 1),
        "host_ms": round(1e3 * host, 1),
        "end_syncs": end.syncs.total(),
    }
    print(f"{base.name}: {parameters / 1e9:.2f} billion parameters, {rows} rows of {arguments.tokens} tokens")
    print(f"  kernels {found['kernels']}, waits {dict(step.syncs)}, copies {dict(step.copies)} a step")
    print(f"  waits at the end of a stack: {dict(end.syncs)}")
    print(f"  {found['flop_per_token'] / 1e9:.2f} GFLOP and {found['saved_bytes_per_token'] / 1e6:.2f} MB kept a token")
    print(f"  predicted: device {found['device_ms']} ms, launches {found['host_ms']} ms a step", end=", ")
    print(f"{found['passages_per_s']} passages/s of {PASSAGE} tokens, MFU {found['mfu']:.3f}")
    for part, share in found["shares"].items():
        print(f"    {share:6.1%}  {part}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="passages in a step; fewer when they do not fit")
    parser.add_argument("--tokens", type=int, default=240, help="tokens of an example")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the card's bf16 rate on paper, for the MFU")
    parser.add_argument("--matrix-tflops", type=float, default=600.0, help="the rate that large bf16 products reach")
    parser.add_argument("--memory-tb", type=float, default=2.7, help="TB/s that elementwise kernels reach")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="the card's memory")
    parser.add_argument("--launch-us", type=float, default=6.0, help="time of the host for one kernel, in µs")
    parser.add_argument("--smoke", action="store_true", help="a tiny model of each family, to test that it runs")
    arguments = parser.parse_args()
    found = {name: plan(meta_model(name, arguments.smoke), arguments) for name in SHAPES}
    one = found["1b"]
    summary = {
        "syncs_per_step": one["syncs"],
        "copies_per_step": one["copies"],
        "kernels_per_step": one["kernels"],
        "saved_bytes_per_token": one["saved_bytes_per_token"],
        "flop_per_token": one["flop_per_token"],
        "passages_per_s": {name: plan["passages_per_s"] for name, plan in found.items()},
        "mfu": {name: plan["mfu"] for name, plan in found.items()},
        "models": found,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
