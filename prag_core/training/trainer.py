"""Training the adapters of many passages in one forward pass, each as if it were trained alone.

A stack of D passages keeps its factors side by side, for each module `[D, rank, inputs]` and `[D, outputs, rank]`. Each
step passes one example of each passage (or `recipe.examples_per_step`), padded to one length, through the frozen model.
The loss is the sum of each passage's mean, so each passage has its own gradient, and an elementwise AdamW over the
stack is D independent optimizers. A passage's factors are copied out after its own last step; later updates of its row
are ignored. See docs/trainer.md.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prag_core.errors import ModelError
from prag_core.identity import checksum
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import (
    Factors,
    Injector,
    RowAdapters,
    TrainedAdapter,
    changes_nothing,
    check_factors,
    initial_factors,
)
from prag_core.llm.memory import free_unused, is_out_of_memory
from prag_core.recipe import TrainRecipe
from prag_core.training.cross_entropy import ChunkedCrossEntropy
from prag_core.training.examples import TrainingExample, TrainingJob

log = logging.getLogger(__name__)

# (layer, target) → A `[D, rank, inputs]` and B `[D, outputs, rank]` of D adapters.
StackedFactors = dict[tuple[int, str], tuple[Tensor, Tensor]]


def stack_factors(
    layout: LoraLayout, factors: Factors, count: int, *, dtype: torch.dtype, device: torch.device
) -> StackedFactors:
    """Return `count` trainable copies of an adapter's factors, as leaf tensors."""

    def leaf(name: str, position: int) -> Tensor:
        one = factors[name][position].to(device=device, dtype=dtype)
        return one.expand(count, -1, -1).clone().requires_grad_()

    return {
        (layer, target): (leaf(f"{target}.A", position), leaf(f"{target}.B", position))
        for target in layout.targets
        for position, layer in enumerate(layout.layers)
    }


def unstack_factors(layout: LoraLayout, stacked: StackedFactors, row: int) -> dict[str, Tensor]:
    """Return a copy of one adapter's factors, in the layout's shapes."""
    return {
        f"{target}.{name}": torch.stack([stacked[layer, target][i][row].detach() for layer in layout.layers])
        for target in layout.targets
        for i, name in enumerate("AB")
    }


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
        self._start = initial_factors(self.layout, recipe.seed) if start is None else start
        check_factors(self.layout, self._start, "start")
        self._tokens_that_fit: int | None = None
        self._checkpointing: list[torch.nn.Module] = []
        if checkpoint:
            base.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._injector.recompute_contexts}
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
        """Restore the base model: remove the hooks and turn off checkpointing."""
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
        on_step: Callable[[int, int], None] | None = None,
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
            on_step: Called after each step with (steps done, steps in all) of the current stack.
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

    def _train_stack(
        self, jobs: Sequence[TrainingJob], on_step: Callable[[int, int], None] | None
    ) -> list[TrainedAdapter]:
        # Most steps first, so that the unfinished passages are always the first rows.
        jobs = sorted(jobs, key=lambda job: -len(job.examples))
        recipe, device = self.recipe, self.base.device
        begun = time.perf_counter()

        # 1. Stack the factors: two leaf tensors for each module, with the same start for each passage.
        stacked = stack_factors(self.layout, self._start, len(jobs), dtype=self._precision, device=device)
        leaves = [leaf for pair in stacked.values() for leaf in pair]
        rate = recipe.rate_for(self._head.in_features)
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=recipe.weight_decay)

        # 2. Each step trains a group of examples of each unfinished passage. Losses are read at the end, since reading
        # one makes the host wait for the device.
        size = recipe.examples_per_step
        groups = [[job.examples[i : i + size] for i in range(0, len(job.examples), size)] for job in jobs]
        steps = [len(epoch) * recipe.epochs for epoch in groups]
        means: list[Tensor] = []
        finished: dict[str, dict[str, Tensor]] = {}
        for step in range(max(steps)):
            rows = sum(1 for count in steps if step < count)
            batch = [epoch[step % len(epoch)] for epoch in groups[:rows]]
            active = {place: (a[:rows], b[:rows]) for place, (a, b) in stacked.items()}
            total, mean = self.loss(batch, active)
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            means.append(mean)
            for row in range(rows):
                if step + 1 == steps[row]:
                    finished[jobs[row].key] = unstack_factors(self.layout, stacked, row)
            if on_step is not None:
                on_step(step + 1, max(steps))

        # 3. Collect each passage's factors and losses, and check that they are finite.
        table = torch.nn.utils.rnn.pad_sequence([mean.cpu() for mean in means]).tolist()
        total_tokens = sum(job.tokens for job in jobs)
        seconds = time.perf_counter() - begun
        trained = []
        for row, job in enumerate(jobs):
            epoch = len(groups[row])
            losses = table[row][: steps[row]]
            factors = {name: factor.cpu() for name, factor in finished[job.key].items()}
            numbers = [*losses, *(float(factor.abs().max()) for factor in factors.values())]
            failure = "" if all(math.isfinite(number) for number in numbers) else "loss_not_finite"
            decay = (1 - recipe.learning_rate * recipe.weight_decay) ** steps[row]
            if not failure and not has_learned(factors, self._start, decay):
                failure = "nothing_learned"
            trained.append(
                TrainedAdapter(
                    key=job.key,
                    factors=None if failure else factors,
                    steps=steps[row],
                    tokens=job.tokens * recipe.epochs,
                    first_loss=sum(losses[:epoch]) / epoch,
                    last_loss=sum(losses[-epoch:]) / epoch,
                    seconds=seconds * job.tokens / total_tokens,
                    failure=failure,
                )
            )
        return trained

    def loss(
        self,
        batch: Sequence[Sequence[TrainingExample]],
        factors: StackedFactors,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the adapters' mean losses (differentiable), and the means `[D]`.

        Args:
            batch: The examples of each of D adapters, at least one each.
            factors: The factors of D adapters.
        """
        device = self.base.device
        # Each adapter gets as many rows as the one with the most examples; rows without an example are not scored.
        most = max(map(len, batch))
        rows = [group[i].ids if i < len(group) else (0,) for group in batch for i in range(most)]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        # Position t predicts token t + 1. Indices are computed on the host, which knows the lengths.
        positions, targets, counts, adapters = [], [], [], []
        for adapter, group in enumerate(batch):
            for row, example in enumerate(group, start=adapter * most):
                begin, end = example.scored_from, len(example.ids)
                positions.append(torch.arange(begin - 1, end - 1) + row * ids.shape[1])
                targets.append(ids[row, begin:end])
                counts.append(end - begin)
                adapters.append(adapter)
        lengths = torch.tensor(counts)
        adapter_of = torch.tensor(adapters).repeat_interleave(lengths)
        shares = [1.0 / (counts[i] * len(batch[adapter])) for i, adapter in enumerate(adapters)]
        token_weights = torch.tensor(shares, dtype=self._precision).repeat_interleave(lengths)
        weights = torch.full((len(batch), self.layout.rank), self.layout.scale, device=device)
        # The padding is on the right, where causal attention does not reach, so no mask is needed.
        active = {place: (a, b.transpose(1, 2)) for place, (a, b) in factors.items()}
        with self._injector.active(RowAdapters(active, weights)):
            hidden = self._decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        token_weights = token_weights.to(device)
        total, losses = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1).index_select(0, torch.cat(positions).to(device)),
            self._head.weight,
            torch.cat(targets).to(device),
            token_weights,
            self._softcap,
        )
        means = torch.zeros(len(batch), device=device, dtype=self._precision).index_add_(
            0, adapter_of.to(device), losses * token_weights
        )
        return total, means


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


def has_learned(factors: Factors, start: Factors, decay: float = 1.0) -> bool:
    """Return whether training has changed an adapter: its B is neither zero nor the one it started from.

    `decay` is what weight decay alone makes of the start, as a factor. A change within rounding is none.
    """
    learned = {
        name: factor - decay * start[name].to(factor.dtype)
        for name, factor in factors.items()
        if name.endswith(".B") and not torch.allclose(factor, decay * start[name].to(factor.dtype), atol=0.0)
    }
    return bool(learned) and not changes_nothing(learned) and not changes_nothing(factors)


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
