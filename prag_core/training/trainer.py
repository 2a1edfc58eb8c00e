"""Training the adapters of many passages in one forward pass, each as if it were trained alone.

A stack of D passages keeps its factors side by side: for each target two tensors with the factors of all layers. Each
step passes one example of each passage (or `recipe.examples_per_step`) through the frozen model, packed into one row
without padding where the model's layers allow it.
The loss is the sum of each passage's mean, so each passage has its own gradient, and an elementwise AdamW over the
stack is D independent optimizers, each with the learning rate of its passage's own step. A passage's factors are copied
out after its own last step; later updates of its row are ignored. The host waits for the device once a stack, at its
end. See docs/trainer.md.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prag_core.errors import ModelError
from prag_core.identity import checksum
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import (
    LEAST_B,
    Factors,
    Injector,
    RowAdapters,
    TrainedAdapter,
    check_factors,
    initial_factors,
)
from prag_core.llm.memory import free_unused, is_out_of_memory
from prag_core.recipe import Schedule, TrainRecipe
from prag_core.training.cross_entropy import ChunkedCrossEntropy
from prag_core.training.examples import TrainingExample, TrainingJob
from prag_core.training.layers import Packing, TrainingLayers

log = logging.getLogger(__name__)

# Rows with a smaller share of padding are not packed: copying tokens to and fro would cost more than it saves.
_LEAST_PADDING = 0.05

# Called with the steps done of a stack, its steps in all, and its adapters.
OnStep = Callable[[int, int, int], None]

# target → A `[D, layers, rank, inputs]` and the transpose of B `[D, layers, rank, outputs]` of D adapters.
StackedFactors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Step:
    """One step's examples on the device; N positions are scored, and position t predicts token t + 1."""

    ids: Tensor  # [rows, T], padded on the right, or [1, tokens] if packed
    places: Tensor | None  # [1, tokens], each token's position in its row; None if padded
    packing: Packing | None
    positions: Tensor  # [N], in the flattened ids
    targets: Tensor  # [N]
    adapters: Tensor  # [N], the position's adapter
    weights: Tensor  # [N], the position's share in its adapter's mean loss


def stack_factors(
    layout: LoraLayout, factors: Factors, count: int, *, dtype: torch.dtype, device: torch.device
) -> StackedFactors:
    """Return `count` trainable copies of an adapter's factors, as leaf tensors."""

    def leaf(one: Tensor) -> Tensor:
        one = one.to(device=device, dtype=dtype)
        return one.repeat(count, 1, 1, 1).requires_grad_()

    return {
        target: (leaf(factors[f"{target}.A"]), leaf(factors[f"{target}.B"].transpose(1, 2)))
        for target in layout.targets
    }


def unstack_factors(stacked: StackedFactors, rows: slice) -> dict[str, Tensor]:
    """Return the factors of some adapters in the layout's shapes, with one more dimension in front for the adapters.

    They may be views of the stack.
    """
    found = {}
    for target, (a, b) in stacked.items():
        found[f"{target}.A"] = a.detach()[rows]
        found[f"{target}.B"] = b.detach()[rows].transpose(2, 3).contiguous()
    return found


class Trainer:
    """Trains adapters of one recipe on one frozen base model.

    Args:
        base: The frozen model.
        recipe: How to train.
        start: The factors that all adapters start from, in the layout's shapes; by default those of the recipe's seed.
        checkpoint: Keep only each layer's input for the backward pass, and compute the layer again there: a fraction
            of the memory, at the price of a second forward pass.

    Raises:
        AdapterError: when `start` does not fit the layout.
        ModelError: when the model lacks the recipe's target modules, or when the chunked loss does not support the way
            in which it computes its logits.
    """

    def __init__(
        self, base: BaseModel, recipe: TrainRecipe, start: Factors | None = None, *, checkpoint: bool = False
    ) -> None:
        self.base = base
        self.recipe = recipe
        config = base.model.config
        self._decoder = base.model.get_decoder()
        self._head = base.model.get_output_embeddings()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ModelError(f"{base.name}: scales its logits ({name}), which the chunked loss does not support")
        if self._head.bias is not None:
            raise ModelError(f"{base.name}: its output layer has a bias, which the chunked loss does not support")
        # Factors, moments and losses are in fp32 at least; the parity tests use fp64.
        self._precision = torch.promote_types(base.model.dtype, torch.float32)
        self._injector = Injector(base.model, recipe)
        self._layers = TrainingLayers(base.model, self._injector)
        self._start = initial_factors(self.layout, recipe.seed) if start is None else start
        check_factors(self.layout, self._start, "start")
        self._tokens_that_fit: int | None = None
        self._checkpointing: list[torch.nn.Module] = []
        if checkpoint:
            base.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._layers.recompute_contexts}
            )
            # Only layers in training mode are checkpointed. Their submodules stay in evaluation mode, without dropout.
            self._checkpointing = [m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
            for layer in self._checkpointing:
                layer.training = True

    @property
    def layout(self) -> LoraLayout:
        """The layout of the adapters that this trainer makes."""
        return self._injector.layout

    def close(self) -> None:
        """Restore the base model: its layers as they were, without hooks and checkpointing."""
        self._layers.close()
        self._injector.close()
        if self._checkpointing:
            self.base.model.activation_checkpointing_disable()
        for layer in self._checkpointing:
            layer.training = False

    def train(
        self,
        jobs: Sequence[TrainingJob],
        *,
        tokens_per_step: int,
        on_step: OnStep | None = None,
    ) -> Iterator[TrainedAdapter]:
        """Train each job's adapter and yield it when its stack is done, stack by stack.

        An adapter counts as trained only if training has changed it, and if it is not another job's: one that its
        training left as it was has the failure `nothing_learned`, and one that equals another's has
        `equals_another`. Of jobs with the same examples only the first is trained.

        Args:
            jobs: The adapters to train; each has at least one example.
            tokens_per_step: The most tokens of one step, padding included; it does not change the result beyond
                rounding. When a stack does not fit into memory, its passages and all later ones, also those of later
                calls, are trained in stacks of half as many tokens.
            on_step: Called after each step of a stack.
        """
        distinct = {job.examples: job for job in reversed(jobs)}
        for job in jobs:
            if distinct[job.examples] is not job:
                yield _failed(job, "equals_another")
        seen: set[str] = set()
        tokens_per_step //= self.recipe.examples_per_step
        if self._tokens_that_fit is not None:
            tokens_per_step = min(tokens_per_step, self._tokens_that_fit)
        stacks = deque(make_stacks([job for job in jobs if distinct[job.examples] is job], tokens_per_step))
        while stacks:
            stack = stacks.popleft()
            try:
                trained = self._train_stack(stack, on_step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                trained = None
            # Not in the handler: its exception keeps the failed step's tensors alive.
            if trained is not None:
                yield from check_distinct(trained, seen)
            elif len(stack) == 1:
                yield _failed(stack[0], "out_of_memory")
            else:
                tokens_per_step = self._tokens_that_fit = len(stack) * max(job.longest for job in stack) // 2
                log.warning("out of memory: continuing with stacks of %d tokens", tokens_per_step)
                left = [job for later in (stack, *stacks) for job in later]
                stacks = deque(make_stacks(left, tokens_per_step))
            if trained is None:
                free_unused(self.base.device)

    def _train_stack(self, jobs: Sequence[TrainingJob], on_step: OnStep | None) -> list[TrainedAdapter]:
        # Most steps first, so that the unfinished passages are always the first rows.
        jobs = sorted(jobs, key=lambda job: -len(job.examples))
        recipe, device = self.recipe, self.base.device
        begun = time.perf_counter()

        # 1. Stack the factors, with the same start for each passage.
        stacked = stack_factors(self.layout, self._start, len(jobs), dtype=self._precision, device=device)
        start = {
            name: one.to(device, self._precision)[None] for name, one in self._start.items() if name.endswith(".B")
        }
        leaves = [leaf for pair in stacked.values() for leaf in pair]
        rate = recipe.rate_for(self._head.in_features)
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=recipe.weight_decay, fused=True)

        # 2. Each step trains a group of examples of each unfinished passage. Nothing is read from the device before the
        # end, since the host would wait; meanwhile it prepares the next steps.
        size = recipe.examples_per_step
        groups = [[job.examples[i : i + size] for i in range(0, len(job.examples), size)] for job in jobs]
        steps = [len(epoch) * recipe.epochs for epoch in groups]
        shares = rate_shares(recipe.schedule, steps)
        left_out = (1 - shares).to(device, self._precision)[..., None, None, None]
        means: list[Tensor] = []
        # A GPU writes to pinned memory while the host goes on.
        factors = {
            name: torch.empty(len(jobs), *shape, dtype=self._precision, pin_memory=device.type == "cuda")
            for name, shape in self.layout.tensor_shapes.items()
        }
        finite = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        learned = torch.zeros_like(finite)
        for step in range(max(steps)):
            rows = sum(1 for count in steps if step < count)
            batch = [epoch[step % len(epoch)] for epoch in groups[:rows]]
            total, mean = self.loss(batch, {target: (a[:rows], b[:rows]) for target, (a, b) in stacked.items()})
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            before = [leaf.detach()[:rows].clone() for leaf in leaves] if recipe.schedule == "linear" else []
            optimizer.step()
            # AdamW's update is proportional to the rate, so a part of it is taken back where the rate is to be lower.
            for leaf, old in zip(leaves, before, strict=False):
                leaf.detach()[:rows].lerp_(old, left_out[step, :rows])
            means.append(mean)
            done = slice(sum(1 for count in steps if step + 1 < count), rows)
            if done.start < done.stop:
                made = unstack_factors(stacked, done)
                for name, factor in made.items():
                    factors[name][done].copy_(factor, non_blocking=True)
                finite[done] = _all_finite(made)
                kept = 1 - rate * recipe.weight_decay * shares[: step + 1, done.start]
                learned[done] = _learned(made, start, float(kept.prod()))
            if on_step is not None:
                on_step(step + 1, max(steps), len(jobs))

        # 3. Read the losses and verdicts. With them the copies of the factors are complete too.
        table = torch.nn.utils.rnn.pad_sequence(means)
        facts = torch.cat([table, finite[:, None], learned[:, None]], 1).tolist()
        total_tokens = sum(job.tokens for job in jobs)
        seconds = time.perf_counter() - begun
        trained = []
        for row, job in enumerate(jobs):
            *losses, is_finite, has_changed = facts[row]
            epoch, losses = len(groups[row]), losses[: steps[row]]
            failure = "" if has_changed else "nothing_learned"
            if not is_finite or not all(map(math.isfinite, losses)):
                failure = "loss_not_finite"
            trained.append(
                TrainedAdapter(
                    key=job.key,
                    factors=None if failure else {name: factor[row] for name, factor in factors.items()},
                    steps=steps[row],
                    tokens=job.tokens * recipe.epochs,
                    first_loss=sum(losses[:epoch]) / epoch,
                    last_loss=sum(losses[-epoch:]) / epoch,
                    seconds=seconds * job.tokens / total_tokens,
                    failure=failure,
                )
            )
        return trained

    def loss(self, batch: Sequence[Sequence[TrainingExample]], factors: StackedFactors) -> tuple[Tensor, Tensor]:
        """Return the sum of the adapters' mean losses (differentiable), and the means `[D]`.

        Args:
            batch: The examples of each of D adapters, at least one each.
            factors: The factors of D adapters.
        """
        step = self._to_device(batch)
        dtype = self.base.model.dtype
        active: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for target, (a, b) in factors.items():
            layers = zip(a.to(dtype).unbind(1), (b * self.layout.scale).to(dtype).unbind(1), strict=True)
            active |= {(layer, target): pair for layer, pair in zip(self.layout.layers, layers, strict=True)}
        with self._layers.active(RowAdapters(active, None), step.packing):
            places = {} if step.places is None else {"position_ids": step.places}
            hidden = self._decoder(input_ids=step.ids, **places, use_cache=False).last_hidden_state
        total, losses = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1).index_select(0, step.positions),
            self._head.weight,
            step.targets,
            step.weights,
            self._softcap,
        )
        means = torch.zeros(len(batch), device=losses.device, dtype=losses.dtype)
        return total, means.index_add_(0, step.adapters, losses * step.weights)

    def _to_device(self, batch: Sequence[Sequence[TrainingExample]]) -> _Step:
        """Bring the examples to the device in one copy, for which the host does not wait."""
        # Each adapter gets as many rows as the one with the most examples; rows without an example are not scored.
        most = max(map(len, batch))
        rows = [torch.tensor(group[i].ids if i < len(group) else (0,)) for group in batch for i in range(most)]
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        is_packed = self._layers.can_pack and sum(lengths) < (1 - _LEAST_PADDING) * len(rows) * longest
        # Indices are computed on the host, which knows the lengths.
        if is_packed:
            ids = torch.cat(rows)
            begins = [0, *itertools.accumulate(lengths)]
            places = torch.cat([torch.arange(length) for length in lengths])
            padded = places + torch.arange(0, len(rows) * longest, longest).repeat_interleave(torch.tensor(lengths))
        else:
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            begins = [row * longest for row in range(len(rows))]
            places = padded = torch.empty(0, dtype=torch.int64)
        positions, targets, counts, adapters, shares = [], [], [], [], []
        for adapter, group in enumerate(batch):
            for row, example in enumerate(group, start=adapter * most):
                begin, end = example.scored_from, len(example.ids)
                positions.append(torch.arange(begin - 1, end - 1) + begins[row])
                targets.append(rows[row][begin:end])
                counts.append(end - begin)
                adapters.append(adapter)
                shares.append(1.0 / ((end - begin) * len(group)))
        scored = torch.tensor(counts)
        parts = [
            ids.flatten(),
            places,
            padded,
            torch.cat(positions),
            torch.cat(targets),
            torch.tensor(adapters).repeat_interleave(scored),
            # The bits of fp64 numbers travel as integers.
            torch.tensor(shares, dtype=torch.float64).repeat_interleave(scored).view(torch.int64),
        ]
        device = self.base.device
        copied = torch.cat(parts)
        if device.type == "cuda":
            copied = copied.pin_memory()
        sizes = [len(part) for part in parts]
        flat, places, padded, at, wanted, owners, bits = torch.split(copied.to(device, non_blocking=True), sizes)
        weights = bits.view(torch.float64).to(self._precision)
        if is_packed:
            packing = Packing(len(rows), longest, padded)
            return _Step(flat[None], places[None], packing, at, wanted, owners, weights)
        return _Step(flat.view(ids.shape), None, None, at, wanted, owners, weights)


def rate_shares(schedule: Schedule, steps: Sequence[int]) -> Tensor:
    """Return the learning rate of each step of D passages, `[most steps, D]` in fp64, as a share of the recipe's.

    `linear` goes from 1 in a passage's first step to 1/n in the last of its n, as the schedule of that name in
    transformers does without warm-up.
    """
    if schedule == "constant":
        return torch.ones(max(steps), len(steps), dtype=torch.float64)
    step = torch.arange(max(steps), dtype=torch.float64)[:, None]
    return (1 - step / torch.tensor(steps)).clamp(min=0)


def make_stacks(jobs: Sequence[TrainingJob], tokens_per_step: int) -> list[list[TrainingJob]]:
    """Group jobs of similar length, so that a stack's rows times its longest example are within the budget.

    A job that exceeds the budget is a stack of its own.
    """
    stacks: list[list[TrainingJob]] = []
    for job in sorted(jobs, key=lambda job: (job.longest, job.tokens, job.key)):
        # The jobs are sorted by length, so this one is the longest of its stack.
        if stacks and (len(stacks[-1]) + 1) * job.longest <= tokens_per_step:
            stacks[-1].append(job)
        else:
            stacks.append([job])
    return stacks


def has_learned(factors: Factors, start: Factors) -> bool:
    """Return whether training has changed an adapter: its B is neither zero nor the one it started from.

    A change within rounding is none.
    """
    before = {name: factor[None] for name, factor in start.items() if name.endswith(".B")}
    return bool(_learned({name: factor[None] for name, factor in factors.items()}, before, 1.0))


def _learned(factors: Factors, start: Factors, decay: float) -> Tensor:
    """Return for each of n adapters whether training has changed it, as `[n]` bools on the factors' device.

    `factors` have one more dimension in front, for the adapters. `start` has the B tensors alone, with a dimension of
    size 1 in front. `decay` is what weight decay alone makes of the start, as a factor.
    """
    changed, has_effect = [], []
    for name, before in start.items():
        expected = decay * before.to(factors[name].dtype)
        change = (factors[name] - expected).abs()
        beyond_rounding = (change > 1e-5 * expected.abs()).flatten(1).any(1)
        changed.append(beyond_rounding & (change.flatten(1).amax(1) >= LEAST_B))
        has_effect.append(factors[name].abs().flatten(1).amax(1) >= LEAST_B)
    return torch.stack(changed).any(0) & torch.stack(has_effect).any(0)


def _all_finite(factors: Factors) -> Tensor:
    """Return for each of n adapters `[n, …]` whether all values are finite, as `[n]` bools."""
    return torch.stack([factor.isfinite().flatten(1).all(1) for factor in factors.values()]).all(0)


def check_distinct(trained: Sequence[TrainedAdapter], seen: set[str]) -> Iterator[TrainedAdapter]:
    """Yield the adapters of a stack; those whose B equals another's have failed. `seen` has all digests so far."""
    digests = [_digest(adapter.factors) if adapter.factors is not None else "" for adapter in trained]
    counts = Counter(digests)
    for adapter, digest in zip(trained, digests, strict=True):
        if digest and (counts[digest] > 1 or digest in seen):
            adapter = replace(adapter, factors=None, failure="equals_another")
        yield adapter
    seen.update(digests)


def _digest(factors: Factors) -> str:
    return checksum(b"".join(factors[name].numpy().tobytes() for name in sorted(factors) if name.endswith(".B")))


def _failed(job: TrainingJob, failure: str) -> TrainedAdapter:
    nan = float("nan")
    return TrainedAdapter(job.key, None, 0, job.tokens, nan, nan, 0.0, failure)
