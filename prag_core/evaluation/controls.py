"""Control adapters: random, zero and task adapters. They hold no knowledge of the passage that they stand for.

What an answer gains from one is form, not knowledge. A control adapter has a name in place of a passage's key, and
`ControlSource` returns the factors of such names as well as those of passages. So the engine needs no special case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prag_core.errors import InputError
from prag_core.identity import fingerprint
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors
from prag_core.training.examples import TrainingExample, TrainingJob

# The name of the adapter of zeros.
ZERO_ADAPTER = "nothing:"
_RANDOM, _TASK = "random:", "task:"


def random_name(key: str, seed: int) -> str:
    """Return the name of the random adapter that replaces the adapter of the passage `key`."""
    return f"{_RANDOM}{seed}:{key}"


def task_name(task: str) -> str:
    """Return the name by which a request names the task adapter `task`."""
    return f"{_TASK}{task}"


def random_like(factors: Factors, layout: LoraLayout, seed: int, key: str) -> dict[str, Tensor]:
    """Return a random adapter with the same Frobenius norm ‖B·A‖ in each adapted module as `factors`.

    Its values are normally distributed, in fp32, and depend on the seed and the key alone.
    """
    generator = torch.Generator().manual_seed(int(fingerprint([seed, key]), 16) % 2**63)
    drawn = {
        name: torch.empty(shape).normal_(generator=generator) for name, shape in sorted(layout.tensor_shapes.items())
    }
    for target in layout.targets:
        a, b = f"{target}.A", f"{target}.B"
        ratio = _norms(factors[a], factors[b]) / _norms(drawn[a], drawn[b])
        drawn[b] = drawn[b] * ratio[:, None, None]
    return drawn


def _norms(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖B·A‖ of each layer as `[layers]`, fp32, without computing B·A: ‖B·A‖² = tr(BᵀB · AAᵀ).

    `a` is `[layers, r, inputs]` and `b` is `[layers, outputs, r]`.
    """
    a, b = a.double(), b.double()
    squares = ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
    return squares.clamp(min=0).sqrt().float()


class _Adapters(Protocol):
    def get(self, key: str) -> Mapping[str, Tensor]: ...


class ControlSource:
    """Gives adapters by a passage's key or by a control's name; `read_task` is called once for each task adapter."""

    def __init__(self, adapters: _Adapters, layout: LoraLayout, read_task: Callable[[str], Factors]) -> None:
        self._adapters = adapters
        self._layout = layout
        self._read_task = read_task
        self._tasks: dict[str, Factors] = {}

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the factors of a passage's or a control's adapter.

        Raises:
            AdapterError: when they are missing or broken, or those whose norm a random adapter copies.
        """
        if key == ZERO_ADAPTER:
            return {name: torch.zeros(shape) for name, shape in self._layout.tensor_shapes.items()}
        if key.startswith(_RANDOM):
            seed, _, passage = key.removeprefix(_RANDOM).partition(":")
            return random_like(self._adapters.get(passage), self._layout, int(seed), passage)
        if key.startswith(_TASK):
            if key not in self._tasks:
                self._tasks[key] = self._read_task(key.removeprefix(_TASK))
            return self._tasks[key]
        return self._adapters.get(key)


def task_sets(
    pool: Sequence[str], related: Sequence[Iterable[str]], size: int, seed: int
) -> tuple[list[tuple[str, ...]], list[int]]:
    """Choose sets of passages to train task adapters on, and a set for each question with no passage related to it.

    If `size` passages of the pool are related to no question, they are the one set, for all questions. Otherwise the
    pool is divided into one set more than any question has related passages. So each question finds a set without
    its own passages, and takes the first such set.

    Args:
        pool: Keys of passages with an adapter.
        related: For each question, the keys of its gold and retrieved passages.
        size: The most passages in a set.
        seed: Shuffles the pool.

    Returns:
        The sets, and for each question the position of its set.

    Raises:
        InputError: when the pool is too small.
    """
    shuffled = sorted(pool)
    random.Random(seed).shuffle(shuffled)
    excluded = [set(keys) & set(pool) for keys in related]
    excluded_by_any = set().union(*excluded)
    free = [key for key in shuffled if key not in excluded_by_any]
    if len(free) >= size:
        return [tuple(free[:size])], [0] * len(excluded)
    count = 1 + max(map(len, excluded), default=0)
    if len(shuffled) < count:
        raise InputError(
            f"the control 'task' needs {count} passages with adapters, and there are {len(shuffled)}",
            "leave the control out, or evaluate on a snapshot with more passages",
        )
    sets = [tuple(shuffled[i::count][:size]) for i in range(count)]
    return sets, [next(i for i, chosen in enumerate(sets) if not keys & set(chosen)) for keys in excluded]


def task_job(name: str, examples: Sequence[Sequence[TrainingExample]], rounds: int) -> TrainingJob:
    """Return the training job of a task adapter: `rounds` times as many examples as one passage's adapter has.

    Step by step the examples come from another passage, at the position that they have in its own training. So the
    adapter sees the same forms in the same order, but only some facts of each passage.

    `examples` are, for each passage, the examples of its own adapter.
    """
    count = max(map(len, examples))
    chosen = []
    for step in range(rounds * count):
        passage = examples[step % len(examples)]
        chosen.append(passage[step % count % len(passage)])
    return TrainingJob(name, tuple(chosen))
