"""Control adapters: random, zero and task adapters."""

from __future__ import annotations

import pytest
import torch

from prag_core.errors import InputError
from prag_core.evaluation.controls import (
    ZERO_ADAPTER,
    ControlSource,
    random_like,
    random_name,
    task_job,
    task_name,
    task_sets,
)
from prag_core.llm.layout import LoraLayout
from prag_core.training.examples import TrainingExample
from tests.helpers.adapters import random_adapter

LAYOUT = LoraLayout(rank=2, scale=16.0, layers=(0, 3), targets=("up", "down"), shapes=((6, 10), (10, 6)))


def test_a_random_adapter_has_the_norm_of_the_right_one_in_each_module() -> None:
    right = random_adapter(LAYOUT, 3)
    made = random_like(right, LAYOUT, 0, "k")
    for target in LAYOUT.targets:
        wanted, got = (f[f"{target}.B"] @ f[f"{target}.A"] for f in (right, made))
        assert torch.allclose(wanted.norm(dim=(1, 2)), got.norm(dim=(1, 2)), rtol=1e-4)
        cosine = (wanted * got).sum() / wanted.norm() / got.norm()
        assert abs(cosine) < 0.7
    assert all(
        torch.equal(a, b) for a, b in zip(made.values(), random_like(right, LAYOUT, 0, "k").values(), strict=True)
    )
    other = random_like(right, LAYOUT, 1, "k")
    assert not torch.equal(made["up.A"], other["up.A"])
    # The start of training, B = 0, changes nothing: nor does its random double.
    still = {name: tensor * (name[-1] == "A") for name, tensor in right.items()}
    assert not random_like(still, LAYOUT, 0, "k")["up.B"].any()


def test_controls_are_adapters_like_any_other() -> None:
    class Own:
        def get(self, key: str):
            return random_adapter(LAYOUT, int(key))

    reads = []

    def task(name: str):
        reads.append(name)
        return random_adapter(LAYOUT, 9)

    source = ControlSource(Own(), LAYOUT, task)
    assert torch.equal(source.get("4")["up.A"], random_adapter(LAYOUT, 4)["up.A"])
    expected = random_like(random_adapter(LAYOUT, 4), LAYOUT, 2, "4")
    assert torch.equal(source.get(random_name("4", 2))["up.A"], expected["up.A"])
    assert source.get(task_name("t")) is source.get(task_name("t"))
    assert reads == ["t"]
    assert not any(tensor.any() for tensor in source.get(ZERO_ADAPTER).values())


def test_no_question_is_answered_by_a_task_adapter_of_its_own_passages() -> None:
    pool = [f"k{i}" for i in range(12)]
    # Enough passages that no question is about: one set for all.
    sets, numbers = task_sets(pool, [{"k0"}, {"k1", "x"}], 5, seed=0)
    assert len(sets) == 1
    assert len(sets[0]) == 5
    assert numbers == [0, 0]
    assert not set(sets[0]) & {"k0", "k1"}
    assert task_sets(pool, [{"k0"}], 5, seed=1)[0] != sets
    # Every passage is asked about.
    related = [{pool[i], pool[(i * 5 + 1) % 12]} for i in range(12)]
    sets, numbers = task_sets(pool, related, 8, seed=0)
    assert sorted(key for keys in sets for key in keys) == sorted(pool)
    assert all(not set(sets[number]) & of for number, of in zip(numbers, related, strict=True))
    with pytest.raises(InputError, match="needs 3 passages"):
        task_sets(pool[:2], [set(pool[:2])], 8, seed=0)


def test_a_task_adapter_trains_as_many_steps_as_one_adapter() -> None:
    passages = [[TrainingExample((passage, step)) for step in range(4)] for passage in range(3)]
    job = task_job("t", passages, rounds=1)
    assert [example.ids for example in job.examples] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    twice = [example.ids for example in task_job("t", passages, rounds=2).examples]
    assert twice == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 0), (2, 1), (0, 2), (1, 3)]
