"""Many passages' adapters through one frozen model at once, each as if it were trained alone.

A stack of D passages keeps its parameters side by side, `[D, r, inputs]` a module. Each step takes one example
of each passage, padded to one length, through the frozen model; the loss is the sum of each passage's mean, so
each passage's gradient is its own, and an elementwise AdamW over the stack is D independent optimizers
(docs/trainer.md). A passage's factors are taken out at its own last step; what the optimizer does to its
slot later is nobody's.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prag_core.errors import ModelError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, Injector, RowAdapters, TrainedAdapter, check_factors, initial_factors
from prag_core.recipe import TrainRecipe
from prag_core.training.cross_entropy import ChunkedCrossEntropy
from prag_core.training.examples import TrainingExample, TrainingJob

log = logging.getLogger(__name__)


class Trainer:
    """Trains adapters of one recipe on one frozen base model.

    Args:
        base: The frozen model.
        recipe: How to train.
        start: The factors that every adapter starts from, in the layout's shapes; by default those that the
            recipe's seed gives.
        checkpoint: Keep only each layer's input for the backward pass, and compute the layer again there: a fraction
            of the memory, at the price of a second forward pass.

    Raises:
        AdapterError: when `start` does not fit the layout.
        ModelError: when the model lacks the recipe's target modules, or computes its scores in a way that the
            chunked loss does not know.
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
                raise ModelError(f"{base.name}: scales its scores ({name}), which the chunked loss does not know")
        if self._head.bias is not None:
            raise ModelError(f"{base.name}: its output layer has a bias, which the chunked loss does not know")
        # Factors, moments and losses are kept in fp32 at least; fp64 serves the parity tests.
        self._precision = torch.promote_types(base.model.dtype, torch.float32)
        self._injector = Injector(base.model, recipe)
        self._start = initial_factors(self.layout, recipe.seed) if start is None else start
        check_factors(self.layout, self._start, "start")
        self._checkpointing: list[torch.nn.Module] = []
        if checkpoint:
            base.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._injector.recompute_contexts}
            )
            # Only layers in training mode do it. What is within them stays as it was: no dropout wakes up.
            self._checkpointing = [m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
            for layer in self._checkpointing:
                layer.training = True

    @property
    def layout(self) -> LoraLayout:
        """The layout of the adapters that this trainer makes."""
        return self._injector.layout

    def close(self) -> None:
        """Leave the base model as it was found."""
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
        """Train each job's adapter and yield it when its stack is done, in the order of the stacks.

        Args:
            jobs: What to train; an empty list of examples is a caller's mistake.
            tokens_per_step: How many tokens, padding included, one step may take; a machine fact, of no influence
                on the result beyond rounding. When the device has too little memory for a stack, its passages and
                those after it are trained in stacks of half as many tokens.
            on_step: Called after each step with (steps done, steps in all) of the current stack.
        """
        stacks = deque(make_stacks(jobs, tokens_per_step))
        while stacks:
            stack = stacks.popleft()
            try:
                trained = self._train_stack(stack, on_step)
            except torch.OutOfMemoryError:
                trained = None
            # Outside the handler, whose exception holds the failed step's tensors.
            if trained is not None:
                yield from trained
            elif len(stack) == 1:
                yield _failed(stack[0], "out_of_memory")
            else:
                tokens_per_step = len(stack) * max(job.longest for job in stack) // 2
                log.warning("out of memory: going on with stacks of %d tokens", tokens_per_step)
                left = [job for later in (stack, *stacks) for job in later]
                stacks = deque(make_stacks(left, tokens_per_step))
            if trained is None and self.base.device.type == "cuda":
                torch.cuda.empty_cache()

    def _train_stack(
        self, jobs: Sequence[TrainingJob], on_step: Callable[[int, int], None] | None
    ) -> list[TrainedAdapter]:
        # Most steps first: the passages that are not finished are always the first rows.
        jobs = sorted(jobs, key=lambda job: -len(job.examples))
        recipe, device = self.recipe, self.base.device
        begun = time.perf_counter()

        # 1. The stack's parameters: one leaf a module, the same start for each passage.
        parameters: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for target in self.layout.targets:
            for position, layer in enumerate(self.layout.layers):
                a, b = (
                    self._start[f"{target}.{name}"][position]
                    .to(device=device, dtype=self._precision)
                    .expand(len(jobs), -1, -1)
                    .clone()
                    .requires_grad_()
                    for name in "AB"
                )
                parameters[layer, target] = (a, b)
        leaves = [leaf for pair in parameters.values() for leaf in pair]
        optimizer = torch.optim.AdamW(leaves, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

        # 2. One example of each unfinished passage a step. Losses are read at the end: asking for one earlier
        # would make the host wait for the device at each step.
        steps = [len(job.examples) * recipe.epochs for job in jobs]
        means: list[Tensor] = []
        finished: dict[str, dict[str, Tensor]] = {}
        for step in range(max(steps)):
            rows = sum(1 for count in steps if step < count)
            batch = [job.examples[step % len(job.examples)] for job in jobs[:rows]]
            active = {place: (a[:rows], b[:rows]) for place, (a, b) in parameters.items()}
            total, mean = self.loss(batch, active)
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            means.append(mean)
            for row in range(rows):
                if step + 1 == steps[row]:
                    finished[jobs[row].key] = self._take_out(parameters, row)
            if on_step is not None:
                on_step(step + 1, max(steps))

        # 3. What each passage got, and whether it can be used.
        table = torch.nn.utils.rnn.pad_sequence([mean.cpu() for mean in means]).tolist()
        total_tokens = sum(job.tokens for job in jobs)
        seconds = time.perf_counter() - begun
        trained = []
        for row, job in enumerate(jobs):
            epoch = len(job.examples)
            losses = table[row][: steps[row]]
            factors = {name: factor.cpu() for name, factor in finished[job.key].items()}
            numbers = [*losses, *(float(factor.abs().max()) for factor in factors.values())]
            good = all(math.isfinite(number) for number in numbers)
            trained.append(
                TrainedAdapter(
                    key=job.key,
                    factors=factors if good else None,
                    steps=steps[row],
                    tokens=job.tokens * recipe.epochs,
                    first_loss=sum(losses[:epoch]) / epoch,
                    last_loss=sum(losses[-epoch:]) / epoch,
                    seconds=seconds * job.tokens / total_tokens,
                    failure="" if good else "loss_not_finite",
                )
            )
        return trained

    def loss(
        self,
        batch: Sequence[TrainingExample],
        factors: dict[tuple[int, str], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the rows' mean losses (differentiable), and the means `[R]`."""
        device = self.base.device
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(example.ids) for example in batch], batch_first=True)
        # Position t predicts token t + 1; what is scored is found here, on the host, where the lengths are known.
        places, targets, counts = [], [], []
        for row, example in enumerate(batch):
            begin, end = example.scored_from, len(example.ids)
            places.append(torch.arange(begin - 1, end - 1) + row * ids.shape[1])
            targets.append(ids[row, begin:end])
            counts.append(end - begin)
        row_of = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
        token_weights = (1.0 / torch.tensor(counts, dtype=self._precision))[row_of]
        weights = torch.full((len(batch), self.layout.rank), self.layout.scale, device=device)
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        active = {place: (a, b.transpose(1, 2)) for place, (a, b) in factors.items()}
        with self._injector.active(RowAdapters(active, weights)):
            hidden = self._decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        token_weights = token_weights.to(device)
        total, losses = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1).index_select(0, torch.cat(places).to(device)),
            self._head.weight,
            torch.cat(targets).to(device),
            token_weights,
            self._softcap,
        )
        means = torch.zeros(len(batch), device=device, dtype=self._precision).index_add_(
            0, row_of.to(device), losses * token_weights
        )
        return total, means

    def _take_out(self, parameters: dict[tuple[int, str], tuple[Tensor, Tensor]], row: int) -> dict[str, Tensor]:
        factors = {}
        for target in self.layout.targets:
            for i, name in enumerate("AB"):
                stacked = [parameters[layer, target][i][row].detach() for layer in self.layout.layers]
                factors[f"{target}.{name}"] = torch.stack(stacked)
        return factors


def make_stacks(jobs: Sequence[TrainingJob], tokens_per_step: int) -> list[list[TrainingJob]]:
    """Group jobs of like length so that a step's rows times its longest example stay within the budget.

    A job that is longer than the budget is a stack of its own.
    """

    stacks: list[list[TrainingJob]] = []
    for job in sorted(jobs, key=lambda job: (job.longest, job.tokens, job.key)):
        # Sorted by length, so that this job is the longest of the stack it joins.
        if stacks and (len(stacks[-1]) + 1) * job.longest <= tokens_per_step:
            stacks[-1].append(job)
        else:
            stacks.append([job])
    return stacks


def _failed(job: TrainingJob, failure: str) -> TrainedAdapter:
    nothing = float("nan")
    return TrainedAdapter(job.key, None, 0, job.tokens, nothing, nothing, 0.0, failure)
