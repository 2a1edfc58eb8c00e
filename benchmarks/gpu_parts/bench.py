"""What the parts share: sizes, the device, the time that is left, random models and random passages."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import wait_for
from transformers import AutoModelForCausalLM, LlamaConfig

from prag_core.config import ModelConfig
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, TrainedAdapter, initial_factors
from prag_core.recipe import TrainRecipe
from prag_core.testing import write_tiny_model
from prag_core.training.examples import TrainingExample, TrainingJob
from prag_core.training.trainer import OnStep, Trainer

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The shapes of the models (hidden, feed-forward, layers, heads, vocabulary), and how much each part does.

    `paper` and `recall` are the tokens of each example of a passage. `long_prompts` is how many prompts are read, and
    the tokens of each.
    """

    shapes: Mapping[str, tuple[int, int, int, int, int]]
    matrix: int
    copy_bytes: int
    paper: tuple[int, ...]
    recall: tuple[int, ...]
    checked_passages: int
    passages: int
    peft_passages: int
    tokens_per_step: int
    stacks: tuple[int, ...]
    budgets: tuple[int, ...]
    rows: tuple[int, ...]
    prompt: int
    new_tokens: int
    chunks: tuple[int, ...]
    long_prompts: tuple[int, int]
    passages_8b: int
    peft_passages_8b: int
    tokens_per_step_8b: int


FULL = Sizes(
    shapes={"1b": (2048, 8192, 16, 32, 128_256), "8b": (4096, 14_336, 32, 32, 128_256)},
    matrix=8192,
    copy_bytes=1 << 30,
    # Of a passage of 100 words: with the passage, with a rewrite, both again, and a question alone.
    paper=(240, 230, 240, 230, 70),
    recall=(32,) * 11,
    checked_passages=64,
    passages=256,
    peft_passages=16,
    tokens_per_step=65_536,
    stacks=(8, 16, 32, 64, 128, 256),
    budgets=(8192, 32_768, 131_072),
    rows=(1, 16, 64),
    prompt=256,
    new_tokens=96,
    chunks=(512, 1024, 2048, 4096, 8192),
    long_prompts=(8, 2048),
    passages_8b=64,
    peft_passages_8b=4,
    tokens_per_step_8b=16_384,
)
SMOKE = Sizes(
    shapes={"1b": (64, 96, 2, 8, 300), "8b": (64, 128, 2, 8, 300)},
    matrix=128,
    copy_bytes=1 << 20,
    paper=(24, 23, 24, 23, 7),
    recall=(12,) * 3,
    checked_passages=8,
    passages=8,
    peft_passages=1,
    tokens_per_step=256,
    stacks=(2, 8),
    budgets=(64, 512),
    rows=(1, 16, 64),
    prompt=16,
    new_tokens=8,
    chunks=(32, 128),
    long_prompts=(4, 64),
    passages_8b=2,
    peft_passages_8b=1,
    tokens_per_step_8b=64,
)


class Bench:
    """The device with its models, and the time that is left."""

    def __init__(self, sizes: Sizes, device: str, minutes: float, folder: Path) -> None:
        self.sizes = sizes
        self.device = device
        self._deadline = time.monotonic() + 60 * minutes
        self._small = write_tiny_model(folder, hidden=64, feed_forward=96)
        self._held: tuple[str, BaseModel] | None = None

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._deadline - time.monotonic()

    def small_config(self, device: str = "") -> ModelConfig:
        """Return the configuration with which a worker would load the small model, by default onto the device."""
        return ModelConfig(name=str(self._small), dtype="float32", device=device or self.device)

    def small(self, dtype: torch.dtype = torch.float32, device: str = "") -> BaseModel:
        """Load the small model, by default onto the device."""
        base = load_base_model(self.small_config(device))
        base.model.to(dtype)
        return base

    def base(self, name: str) -> BaseModel:
        """Return the random model of a shape in bf16, and drop that of another shape."""
        if self._held is None or self._held[0] != name:
            self._held = None
            self.free()
            self._held = name, self.random_model(name, torch.bfloat16)
        return self._held[1]

    def random_model(self, name: str, dtype: torch.dtype) -> BaseModel:
        """Return a new random model of a shape. Its tokenizer is the small model's, and turns no token into text."""
        hidden, feed_forward, layers, heads, vocabulary = self.sizes.shapes[name]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            vocab_size=vocabulary,
            max_position_embeddings=16_384,
            tie_word_embeddings=name == "1b",
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False)
        return BaseModel(name, name, model.eval(), self.small(device="cpu").tokenizer)

    def free(self) -> None:
        """Give back the memory that nothing uses, and measure the peak from here on."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Return the median time of a call after one that does not count; fewer repeats when time is short."""
        times: list[float] = []
        while len(times) < 2 or (len(times) <= repeats and self.left() > 2 * times[-1]):
            wait_for(self.device)
            begun = time.perf_counter()
            call()
            wait_for(self.device)
            times.append(time.perf_counter() - begun)
        return statistics.median(times[1:])

    def attempt(self, call: Callable[[], Figures], needs_s: float) -> Figures:
        """Return a call's figures, or its error, or that there was no time for it."""
        self.free()
        if self.left() < needs_s:
            return {"skipped": f"needs {needs_s:.0f} s, and {max(0.0, self.left()):.0f} s are left"}
        try:
            return call()
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def rows(self, calls: Mapping[str, Callable[[], Figures]], needs_s: float) -> Figures:
        """Return the figures of the rows of a part: a row that fails, or finds no time, leaves the others as they are.

        Each is also printed to stderr as it ends.
        """
        found = {}
        for name, call in calls.items():
            found[name] = self.attempt(call, needs_s)
            print(f"  {name}: {found[name]}", file=sys.stderr, flush=True)
        return found


def random_jobs(
    lengths: Sequence[int], count: int, vocabulary: int, *, scored: int = 0, spread: float = 0.4
) -> list[TrainingJob]:
    """Return passages whose examples are random tokens.

    Args:
        lengths: The tokens of each example; a passage's are longer or shorter by up to `spread` of it.
        count: The number of passages.
        vocabulary: The number of different tokens.
        scored: How many of an example's last tokens count for the loss; 0 for all.
        spread: See `lengths`.
    """
    draw = torch.Generator().manual_seed(0)
    jobs = []
    for number in range(count):
        scale = float(torch.empty(1).uniform_(1 - spread, 1 + spread, generator=draw))
        rows = [torch.randint(vocabulary, (max(2, round(n * scale)),), generator=draw).tolist() for n in lengths]
        examples = [TrainingExample(tuple(row), max(1, len(row) - scored) if scored else 1) for row in rows]
        jobs.append(TrainingJob(str(number), tuple(examples)))
    return jobs


def random_prompts(count: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Return prompts of random tokens, without the small model's control tokens."""
    return torch.randint(3, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def random_adapter(layout: LoraLayout, seed: int) -> Factors:
    """Return an adapter that changes what a model says."""
    draw = torch.Generator().manual_seed(seed)
    start = initial_factors(layout, seed)
    return {name: f + 0.02 * torch.randn(f.shape, generator=draw) for name, f in start.items()}


def train(
    base: BaseModel,
    jobs: Sequence[TrainingJob],
    recipe: TrainRecipe,
    tokens_per_step: int,
    *,
    checkpoint: bool = False,
    on_step: OnStep | None = None,
) -> list[TrainedAdapter]:
    """Return the trained adapters of all jobs; it is an error if one has failed."""
    trainer = Trainer(base, recipe, checkpoint=checkpoint)
    try:
        trained = list(trainer.train(jobs, tokens_per_step=tokens_per_step, on_step=on_step))
    finally:
        trainer.close()
    if failed := Counter(adapter.failure for adapter in trained if adapter.factors is None):
        raise RuntimeError(f"{failed.total()} of {len(trained)} adapters have failed: {dict(failed)}")
    return trained
