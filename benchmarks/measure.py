"""Shared by the benchmarks: the machine in words, its matrix rate, its memory, and the plain PEFT loop to compare with.

Some benchmarks measure the memory of a process that needs no torch, so functions here import torch inside.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from prag_core.llm.base_model import BaseModel
    from prag_core.recipe import TrainRecipe
    from prag_core.training.examples import TrainingJob


def machine(device: torch.device | str = "cpu") -> str:
    """Return the name of the processor or GPU, with its cores, torch's threads and torch's version."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait_for(device: torch.device | str) -> None:
    """Wait until the device has done all work that was submitted to it."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(dtype: torch.dtype, device: torch.device | str, shape: tuple[int, int, int]) -> float:
    """Return the FLOP/s of a product of this shape (rows, inputs, outputs), the median of seven."""
    import torch

    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs, device=device).to(dtype)
    w = torch.randn(outputs, inputs, device=device).to(dtype)
    repeats = 1
    while True:
        seconds = []
        for _ in range(7):
            wait_for(device)
            begun = time.perf_counter()
            for _ in range(repeats):
                torch.nn.functional.linear(x, w)
            wait_for(device)
            seconds.append(time.perf_counter() - begun)
        if statistics.median(seconds) > 0.05:
            return 2 * rows * inputs * outputs * repeats / statistics.median(seconds)
        repeats *= 4


def peak_gb(device: torch.device | str) -> float:
    """Return the most memory that this process used on the device so far, in GB."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_mb() / 1e3


def peak_mb() -> float:
    """Return the most memory that this process had resident so far, in MB (Linux)."""
    # Not `ru_maxrss`: it includes the memory of the parent when it started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e6


def peft_seconds(base: BaseModel, jobs: Sequence[TrainingJob], recipe: TrainRecipe, pad_to: int = 0) -> float:
    """Train one passage after the other as the paper's code does (PEFT, AdamW, batch 1), and return the seconds.

    Each example is padded to `pad_to` tokens; 0 means no padding.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    device = base.device
    wait_for(device)
    begun = time.perf_counter()
    for job in jobs:
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets))
        model = get_peft_model(base.model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.learning_rate)
        for _ in range(recipe.epochs):
            for example in job.examples:
                padding = max(0, pad_to - len(example.ids))
                ids = torch.tensor([[*example.ids, *[0] * padding]], device=device)
                labels = torch.tensor([[*example.ids, *[-100] * padding]], device=device)
                # Without padding no mask is needed, and attention without a mask is faster.
                mask = (labels != -100).long() if padding else None
                optimizer.zero_grad()
                model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
                optimizer.step()
        model.unload()
    wait_for(device)
    return time.perf_counter() - begun


def stacked_seconds(base: BaseModel, jobs: Sequence[TrainingJob], recipe: TrainRecipe, tokens_per_step: int) -> float:
    """Train the passages together, as the pipeline does, and return the seconds."""
    from prag_core.training.trainer import Trainer

    trainer = Trainer(base, recipe)
    wait_for(base.device)
    begun = time.perf_counter()
    for adapter in trainer.train(jobs, tokens_per_step=tokens_per_step):
        if adapter.factors is None:
            raise RuntimeError(f"{adapter.key}: {adapter.failure}")
    wait_for(base.device)
    seconds = time.perf_counter() - begun
    trainer.close()
    return seconds


# Parts of the time: everything inside one of these profiler events, and elsewhere the operators of `_part_of`.
_STRETCHES = {
    "Optimizer.step": "AdamW",
    "ChunkedCrossEntropy": "the loss, with its products with the output layer",
    "aten::_scaled_dot_product": "attention",
}
_FROZEN, _BATCHED = ("aten::mm", "aten::addmm", "aten::addmm_"), ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")


def time_shares(events: Iterable[Any], device: torch.device | str) -> dict[str, float]:
    """Return the share of each part of a training's time on the device, largest first.

    `events` are those that torch's profiler has seen of the trainer. On CUDA a part's time is that of the kernels which
    its operators have started.
    """
    import torch
    from torch.autograd import DeviceType

    own_time = "self_device_time_total" if torch.device(device).type == "cuda" else "self_cpu_time_total"
    shares: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            shares[_part_of(event)] += getattr(event, own_time)
    return {name: time / shares.total() for name, time in shares.most_common()}


def _part_of(event: Any) -> str:
    around, feed_forward = event, False
    while around is not None:
        for stretch, name in _STRETCHES.items():
            if around.name.startswith(stretch):
                return name
        feed_forward |= around.name.startswith("GatedFeedForward")
        around = around.cpu_parent
    if event.name in _FROZEN:
        return "products with the layers' frozen weights"
    # The recipe adapts the feed-forward networks alone, so batched products elsewhere are attention's.
    if event.name in _BATCHED and feed_forward:
        return "products with the adapters' factors"
    if event.name in _BATCHED or "softmax" in event.name or "attention" in event.name:
        return "attention"
    return "gates, norms, copies and all else"


def padding(jobs: Sequence[TrainingJob], stacks: Sequence[Sequence[TrainingJob]]) -> float:
    """Return the share of the computed positions that hold no token."""
    computed = 0
    for stack in stacks:
        for step in range(max(len(job.examples) for job in stack)):
            lengths = [len(job.examples[step].ids) for job in stack if step < len(job.examples)]
            computed += len(lengths) * max(lengths)
    return 1 - sum(job.tokens for job in jobs) / computed
