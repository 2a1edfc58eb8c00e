"""Many passages' adapters through one frozen model at once, each as if it were trained alone.

A stack of D passages keeps its parameters side by side, `[D, r, inputs]` a module. Each step takes one example
of each passage, padded to one length, through the frozen model; the loss is the sum of each passage's mean, so
each passage's gradient is its own, and an elementwise AdamW over the stack is D independent optimizers
(design, section 5). A passage's factors are taken out at its own last step; what the optimizer does to its
slot later is nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prag_core.errors import ModelError
from prag_core.lora import Injector, LoraLayout, RowAdapters, initial_factors
from prag_core.models import BaseModel
from prag_core.recipe import TrainRecipe

# Positions whose vocabulary scores exist at one time: the whole `[tokens, vocabulary]` in fp32 is gigabytes.
_LOSS_CHUNK = 256


@dataclass(frozen=True)
class TrainingJob:
    """One adapter to train: the passage's key and its examples as token ids, in order, one step each."""

    key: str
    examples: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of one epoch."""
        return sum(len(example) for example in self.examples)


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter as training left it: fp32 factors on the CPU, and how it went.

    `factors` is None when the loss or a factor stopped being finite: the passage is a reject, and nothing of it
    reached its neighbours. `first_loss` and `last_loss` are means over the first and the last epoch.
    """

    key: str
    factors: dict[str, Tensor] | None
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float


class Trainer:
    """Trains adapters of one recipe on one frozen base model.

    Raises:
        ModelError: when the model lacks the recipe's target modules, or computes its scores in a way that the
            chunked loss does not know.
    """

    def __init__(self, base: BaseModel, recipe: TrainRecipe) -> None:
        self.base = base
        self.recipe = recipe
        self._injector = Injector(base.model, recipe)
        self._decoder = base.model.get_decoder()
        self._head = base.model.get_output_embeddings()
        # Factors, moments and losses are kept in fp32 at least; fp64 serves the parity tests.
        self._precision = torch.promote_types(base.model.dtype, torch.float32)
        config = base.model.config
        if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None):
            raise ModelError(f"{base.name}: scales or caps its scores, which the chunked loss does not know yet")
        if self._head.bias is not None:
            raise ModelError(f"{base.name}: its output layer has a bias, which the chunked loss does not know yet")

    @property
    def layout(self) -> LoraLayout:
        """The layout of the adapters that this trainer makes."""
        return self._injector.layout

    def close(self) -> None:
        """Leave the base model as it was found."""
        self._injector.close()

    def train(
        self,
        jobs: Sequence[TrainingJob],
        *,
        tokens_per_step: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[TrainedAdapter]:
        """Train each job's adapter and yield it when its stack is done, in the order of the stacks.

        Args:
            jobs: What to train; an empty list of examples is a caller's mistake.
            tokens_per_step: How many tokens, padding included, one step may take; a machine fact, of no influence
                on the result beyond rounding.
            on_step: Called after each step with (steps done, steps in all) of the current stack.
        """
        for stack in make_stacks(jobs, tokens_per_step):
            yield from self._train_stack(stack, on_step)

    def _train_stack(
        self, jobs: Sequence[TrainingJob], on_step: Callable[[int, int], None] | None
    ) -> list[TrainedAdapter]:
        # Most steps first: the passages that are not finished are always the first rows.
        jobs = sorted(jobs, key=lambda job: -len(job.examples))
        recipe, device = self.recipe, self.base.device
        begun = time.perf_counter()

        # 1. The stack's parameters: one leaf a module, the same start for each passage.
        start = initial_factors(self.layout, recipe.seed)
        parameters: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for target in self.layout.targets:
            for position, layer in enumerate(self.layout.layers):
                a, b = (
                    start[f"{target}.{name}"][position]
                    .to(device=device, dtype=self._precision)
                    .expand(len(jobs), -1, -1)
                    .clone()
                    .requires_grad_()
                    for name in "AB"
                )
                parameters[layer, target] = (a, b)
        leaves = [leaf for pair in parameters.values() for leaf in pair]
        optimizer = torch.optim.AdamW(leaves, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

        # 2. One example of each unfinished passage a step.
        steps = [len(job.examples) * recipe.epochs for job in jobs]
        losses: list[list[float]] = [[] for _ in jobs]
        finished: dict[str, dict[str, Tensor]] = {}
        for step in range(max(steps)):
            rows = sum(1 for count in steps if step < count)
            batch = [job.examples[step % len(job.examples)] for job in jobs[:rows]]
            active = {place: (a[:rows], b[:rows]) for place, (a, b) in parameters.items()}
            total, means = self._loss(batch, active)
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for row, mean in enumerate(means.tolist()):
                losses[row].append(mean)
            for row in range(rows):
                if step + 1 == steps[row]:
                    finished[jobs[row].key] = self._take_out(parameters, row)
            if on_step is not None:
                on_step(step + 1, max(steps))

        # 3. What each passage got, and whether it can be used.
        tokens = [job.tokens * recipe.epochs for job in jobs]
        seconds = time.perf_counter() - begun
        trained = []
        for row, job in enumerate(jobs):
            epoch = len(job.examples)
            factors: dict[str, Tensor] | None = finished[job.key]
            numbers = [*losses[row], *(float(f.abs().max()) for f in finished[job.key].values())]
            if not bool(torch.isfinite(torch.tensor(numbers)).all()):
                factors = None
            trained.append(
                TrainedAdapter(
                    key=job.key,
                    factors=factors,
                    steps=steps[row],
                    tokens=tokens[row],
                    first_loss=sum(losses[row][:epoch]) / epoch,
                    last_loss=sum(losses[row][-epoch:]) / epoch,
                    seconds=seconds * tokens[row] / sum(tokens),
                )
            )
        return trained

    def _loss(
        self,
        batch: Sequence[Sequence[int]],
        factors: dict[tuple[int, str], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the rows' mean losses (differentiable), and the means `[R]`."""
        device = self.base.device
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)
        weights = torch.full((len(batch), self.layout.rank), self.layout.scale, device=device)
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        with self._injector.active(RowAdapters(factors, weights)):
            hidden = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        # Position t predicts token t + 1; only positions that predict a real token are scored.
        lengths = torch.tensor([len(row) for row in batch], device=device)
        scored = torch.arange(ids.shape[1] - 1, device=device) < (lengths - 1)[:, None]
        row_of = scored.nonzero()[:, 0]
        token_weights = 1.0 / (lengths - 1).to(self._precision)[row_of]
        total, losses = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden[:, :-1][scored], self._head.weight, ids[:, 1:][scored], token_weights
        )
        means = torch.zeros(len(batch), device=device, dtype=self._precision).index_add_(
            0, row_of, losses * token_weights
        )
        return total, means

    def _take_out(self, parameters: dict[tuple[int, str], tuple[Tensor, Tensor]], row: int) -> dict[str, Tensor]:
        factors = {}
        for target in self.layout.targets:
            for i, name in enumerate("AB"):
                stacked = [parameters[layer, target][i][row].detach() for layer in self.layout.layers]
                factors[f"{target}.{name}"] = torch.stack(stacked).cpu()
        return factors


def make_stacks(jobs: Sequence[TrainingJob], tokens_per_step: int) -> list[list[TrainingJob]]:
    """Group jobs of like length so that a step's rows times its longest example stay within the budget.

    A job that is longer than the budget is a stack of its own.
    """

    def longest(job: TrainingJob) -> int:
        return max(len(example) for example in job.examples)

    stacks: list[list[TrainingJob]] = []
    for job in sorted(jobs, key=lambda job: (longest(job), job.key)):
        # Sorted by length, so that this job is the longest of the stack it joins.
        if stacks and (len(stacks[-1]) + 1) * longest(job) <= tokens_per_step:
            stacks[-1].append(job)
        else:
            stacks.append([job])
    return stacks


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy over the vocabulary, a chunk of positions at a time.

    The gradient is computed in the forward pass, while a chunk's scores are at hand; the head's weight is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take hidden `[N, H]`, head `[V, H]`, targets, weights `[N]`; give the weighted sum, losses `[N]`."""
        gradient = torch.empty_like(hidden)
        losses = torch.empty_like(token_weights)
        for begin in range(0, len(hidden), _LOSS_CHUNK):
            part = slice(begin, begin + _LOSS_CHUNK)
            scores = (hidden[part] @ head.T).to(token_weights.dtype)
            normalizer = scores.logsumexp(dim=-1, keepdim=True)
            target = targets[part, None]
            losses[part] = (normalizer - scores.gather(1, target))[:, 0]
            probabilities = scores.sub_(normalizer).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
            probabilities.mul_(token_weights[part, None])
            gradient[part] = probabilities.to(hidden.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient by the sum's."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None
