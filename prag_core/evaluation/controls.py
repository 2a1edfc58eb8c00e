"""Adapters that must not help: what an answer gains from them is form, not knowledge.

A control's adapter goes by a name in place of a passage's key, so that the engine answers with it as with any
other: `ControlSource` gives the factors of such names, and those of passages by their keys.
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

NOTHING = "nothing:"
_RANDOM, _TASK = "random:", "task:"


def random_name(key: str, seed: int) -> str:
    """Return the name of the random adapter that stands in for the one of a passage."""
    return f"{_RANDOM}{seed}:{key}"


def task_name(task: str) -> str:
    """Return the name under which the task adapter `task` is asked for."""
    return f"{_TASK}{task}"


def random_like(factors: Factors, layout: LoraLayout, seed: int, key: str) -> dict[str, Tensor]:
    """Return an adapter of normally distributed values with the same ‖B·A‖ (Frobenius) in each adapted module.

    The same seed and key give the same adapter, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(int(fingerprint([seed, key]), 16) % 2**63)
    made = {
        name: torch.empty(shape).normal_(generator=generator) for name, shape in sorted(layout.tensor_shapes.items())
    }
    for target in layout.targets:
        a, b = f"{target}.A", f"{target}.B"
        wanted, got = _norms(factors[a], factors[b]), _norms(made[a], made[b])
        made[b] = made[b] * (wanted / got)[:, None, None]
    return made


def _norms(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖B·A‖ of each layer, `[layers]`, without making the products: ‖B·A‖² = tr(BᵀB · AAᵀ)."""
    a, b = a.double(), b.double()
    squares = ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
    return squares.clamp(min=0).sqrt().float()


class _Adapters(Protocol):
    def get(self, key: str) -> Mapping[str, Tensor]: ...


class ControlSource:
    """Adapters by key or by a control's name.

    Args:
        adapters: The passages' own.
        layout: Their shapes.
        task: Gives a task adapter by its name; it is asked once for each.
    """

    def __init__(self, adapters: _Adapters, layout: LoraLayout, task: Callable[[str], Factors]) -> None:
        self._adapters = adapters
        self._layout = layout
        self._read_task = task
        self._tasks: dict[str, Factors] = {}

    def get(self, key: str) -> Mapping[str, Tensor]:
        """Return the factors of a passage or of a control.

        Raises:
            AdapterError: when they, or those that a random adapter is to equal in norm, are missing or broken.
        """
        if key == NOTHING:
            return {name: torch.zeros(shape) for name, shape in self._layout.tensor_shapes.items()}
        if key.startswith(_RANDOM):
            seed, _, of = key.removeprefix(_RANDOM).partition(":")
            return random_like(self._adapters.get(of), self._layout, int(seed), of)
        if key.startswith(_TASK):
            if key not in self._tasks:
                self._tasks[key] = self._read_task(key.removeprefix(_TASK))
            return self._tasks[key]
        return self._adapters.get(key)


def task_sets(
    pool: Sequence[str], related: Sequence[Iterable[str]], size: int, seed: int
) -> tuple[list[tuple[str, ...]], list[int]]:
    """Choose the passages on which task adapters are trained, so that none is related to a question it answers.

    Where enough passages are related to no question at all, one set of `size` of them serves all questions.
    Otherwise the pool is cut into more sets than any question has related passages, and each question takes the
    first that holds none of its own.

    Returns:
        The sets, and for each question the number of its set.

    Raises:
        InputError: when the pool is too small for that.
    """
    shuffled = sorted(pool)
    random.Random(seed).shuffle(shuffled)
    taken = [set(keys) & set(pool) for keys in related]
    everything = set().union(*taken)
    free = [key for key in shuffled if key not in everything]
    if len(free) >= size:
        return [tuple(free[:size])], [0] * len(taken)
    count = 1 + max(map(len, taken), default=0)
    if len(shuffled) < count:
        raise InputError(
            f"the control 'task' needs {count} passages with adapters, and there are {len(shuffled)}",
            "leave the control out, or evaluate on a snapshot with more passages",
        )
    sets = [tuple(shuffled[i::count][:size]) for i in range(count)]
    return sets, [next(i for i, keys in enumerate(sets) if not keys_of & set(keys)) for keys_of in taken]


def task_job(name: str, examples: Sequence[Sequence[TrainingExample]], rounds: int) -> TrainingJob:
    """Return a task adapter's training: as many examples as one passage's adapter has, `rounds` times.

    Each example is taken from the next of the passages, in the place that it has in its passage's own training: so
    the adapter sees the same forms in the same order, and of each passage only some facts.
    """
    count = max(len(of) for of in examples)
    chosen = []
    for step in range(rounds * count):
        of = examples[step % len(examples)]
        chosen.append(of[step % count % len(of)])
    return TrainingJob(name, tuple(chosen))
