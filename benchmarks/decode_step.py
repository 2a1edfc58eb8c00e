"""A decoding step by its parts, from torch's profiler; `benchmarks/serve.py` prints it.

Hooks switch from one named range of the profile to the next: at the linear modules, at the attention modules, and
around the forward pass. So each operator belongs to one part, whatever the model calls it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from measure import wait_for
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from prag_core.llm.base_model import BaseModel
from prag_core.llm.decode_request import DecodeRequest
from prag_core.llm.decoder import Decoder
from prag_core.llm.lora import FlatAdapter, Injector
from prag_core.llm.packed_linear import PackedLinear
from prag_core.recipe import TrainRecipe

ROWS = (1, 16)
PROMPT_TOKENS = 80
TIMED_STEPS, PROFILED_STEPS = 8, 5
# `norms_gates` is what is left of the forward pass, `sampling` what comes after it. The rest is what comes before it,
# and the profiler's own time.
PARTS = ("frozen_weights", "low_rank", "attention", "norms_gates", "sampling", "rest")


class Ranges:
    """Hooks on a model with an `Injector`, made after it; they name the part of a step in a profile."""

    def __init__(self, model: Any) -> None:
        self._open: record_function | None = None
        # The part to go back to after a linear module.
        self._around = "norms_gates"
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._enter("norms_gates")),
            model.register_forward_hook(lambda *_: self._enter("sampling")),
        ]
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self._handles += [
                    module.register_forward_pre_hook(lambda *_: self._switch("frozen_weights")),
                    # The first hook, and the last one: between them the injector adds the low-rank products.
                    module.register_forward_hook(lambda *_: self._switch("low_rank"), prepend=True),
                    module.register_forward_hook(lambda *_: self._switch(self._around)),
                ]
            elif name.endswith(".self_attn"):
                self._handles += [
                    module.register_forward_pre_hook(lambda *_: self._enter("attention")),
                    module.register_forward_hook(lambda *_: self._enter("norms_gates")),
                ]

    def end(self) -> None:
        """End the last range of a step."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, part: str) -> None:
        self._around = part
        self._switch(part)

    def _switch(self, part: str) -> None:
        self.end()
        self._open = record_function(part)
        self._open.__enter__()


def step_parts(base: BaseModel, recipe: TrainRecipe, adapters: Sequence[FlatAdapter]) -> dict[str, dict[str, float]]:
    """Return milliseconds of a decoding step, and each part's share, by rows and adapters: `"16 rows, k = 3"`.

    `plain_ms` is the same step with the weights as the model stores them, measured in turns (decision 114).
    """
    injector = Injector(base.model, recipe)
    found = {}
    for rows in ROWS:
        for k in (0, len(adapters)):
            decoder = Decoder(base, injector, slots=rows)
            for row in range(rows):
                prompt = [3 + (row + place) % 200 for place in range(PROMPT_TOKENS)]
                decoder.submit(DecodeRequest(prompt, 100, adapters=[(adapter, 1.0) for adapter in adapters[:k]]))
            while len(decoder.step()) < rows:
                pass
            packed, plain = [], []
            for _ in range(TIMED_STEPS):
                packed.append(timed(base, decoder))
                with unpacked(base.model):
                    plain.append(timed(base, decoder))
            taken = {"ms": statistics.median(packed), "plain_ms": statistics.median(plain)}
            shares = parts_of(base, decoder)
            found[f"{rows} rows, k = {k}"] = {name: round(value, 2) for name, value in taken.items()} | shares
            text = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            print(
                f"a decoding step, {rows} rows, k = {k}: {taken['ms']:.1f} ms: {text}; with plain weights "
                f"{taken['plain_ms']:.1f} ms",
                flush=True,
            )
    injector.close()
    return found


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Multiply by the weights as they are stored."""
    packed = [module for module in model.modules() if type(module) is PackedLinear]
    for module in packed:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in packed:
            module.__class__ = PackedLinear


def timed(base: BaseModel, decoder: Decoder) -> float:
    wait_for(base.device)
    begun = time.perf_counter()
    decoder.step()
    wait_for(base.device)
    return (time.perf_counter() - begun) * 1e3


def parts_of(base: BaseModel, decoder: Decoder) -> dict[str, float]:
    """Return each part's share of the time of some steps; on a GPU the time of its kernels."""
    on_gpu = base.device.type == "cuda"
    ranges = Ranges(base.model)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    spent = 0.0
    with profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            spent += timed(base, decoder)
            ranges.end()
    ranges.close()
    averages = {average.key: average for average in profiled.key_averages()}
    microseconds = {
        part: (averages[part].device_time_total if on_gpu else averages[part].cpu_time_total)
        for part in PARTS
        if part in averages
    }
    whole = spent * 1e3
    microseconds["rest"] = max(0.0, whole - sum(microseconds.values()))
    return {part: round(microseconds.get(part, 0.0) / whole, 3) for part in PARTS}
