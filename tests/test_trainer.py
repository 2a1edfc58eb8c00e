"""Training many adapters at once gives what training each alone gives, and what PEFT gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import make_augmentation, make_passage
from peft import LoraConfig, get_peft_model

from prag_core.config import ModelConfig
from prag_core.errors import ModelError
from prag_core.examples import training_examples
from prag_core.lora import Factors, initial_factors
from prag_core.models import BaseModel, load_base_model
from prag_core.recipe import RECIPES, TrainRecipe
from prag_core.trainer import Trainer, TrainingJob, make_stacks

RECIPE = replace(RECIPES["small"], epochs=2)


def jobs_of(base: BaseModel, count: int, recipe: TrainRecipe, *, first: int = 0) -> list[TrainingJob]:
    jobs = []
    for number in range(first, first + count):
        passage = make_passage(number, words=5 + 7 * (number % 3))
        augmentation = make_augmentation(passage, pairs=1 + number % 3)
        examples = training_examples(base.tokenizer, passage, augmentation, recipe)
        jobs.append(TrainingJob(passage.key, tuple(map(tuple, examples))))
    return jobs


def train_alone_with_peft(base: BaseModel, job: TrainingJob, recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    """The plain loop: PEFT's modules, torch's AdamW, one example a step. Returns ΔW by `layer.target`."""
    model = get_peft_model(
        copy.deepcopy(base.model),
        LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), lora_dropout=0.0),
    )
    trainer = Trainer(base, recipe)
    start = initial_factors(trainer.layout, recipe.seed)
    trainer.close()
    adapted = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                layer, target = int(name.split("layers.")[1].split(".")[0]), name.rsplit(".", 1)[-1]
                module.lora_A["default"].weight.copy_(start[f"{target}.A"][layer])
                module.lora_B["default"].weight.copy_(start[f"{target}.B"][layer])
                adapted[f"{layer}.{target}"] = module
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    for _ in range(recipe.epochs):
        for example in job.examples:
            ids = torch.tensor([example])
            optimizer.zero_grad()
            # torch's own cross entropy in fp32 is off by 6e-6 on a vocabulary of 49,152 (CPU, 2.13); in fp64 it
            # is what both loops mean.
            scores = model(input_ids=ids).logits[0, :-1].double()
            torch.nn.functional.cross_entropy(scores, ids[0, 1:]).backward()
            optimizer.step()
    return {name: module.get_delta_weight("default").detach() for name, module in adapted.items()}


def delta_weights(factors: Factors, recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    out = {}
    for target in recipe.targets:
        a, b = factors[f"{target}.A"], factors[f"{target}.B"]
        for layer in range(len(a)):
            out[f"{layer}.{target}"] = recipe.scale * b[layer] @ a[layer]
    return out


def worst_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in right)


def train(base: BaseModel, jobs: Sequence[TrainingJob], recipe: TrainRecipe, budget: int) -> dict[str, dict]:
    trainer = Trainer(base, recipe)
    trained = {a.key: delta_weights(a.factors, recipe) for a in trainer.train(jobs, tokens_per_step=budget)}
    trainer.close()
    return trained


@pytest.mark.parametrize("name", ["paper", "small"])
def test_a_stack_equals_peft_alone(tiny: BaseModel, name: str) -> None:
    recipe = replace(RECIPES[name], epochs=2)
    jobs = jobs_of(tiny, 4, recipe)
    stacked = train(tiny, jobs, recipe, budget=100_000)
    for job in jobs:
        assert worst_difference(stacked[job.key], train_alone_with_peft(tiny, job, recipe)) < 1e-4


def test_neighbours_and_order_change_nothing(tiny: BaseModel) -> None:
    jobs = jobs_of(tiny, 6, RECIPE)
    alone = {job.key: train(tiny, [job], RECIPE, budget=1)[job.key] for job in jobs}
    for arrangement, budget in ((jobs, 100_000), (jobs[::-1], 100_000), (jobs[1:4], 2_000)):
        together = train(tiny, arrangement, RECIPE, budget)
        for job in arrangement:
            assert worst_difference(together[job.key], alone[job.key]) < 1e-4


def test_the_base_model_is_untouched(tiny: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    train(tiny, jobs_of(tiny, 3, RECIPE), RECIPE, budget=100_000)
    after = tiny.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_a_passage_whose_loss_breaks_is_quarantined_alone(tiny: BaseModel) -> None:
    # Token 5 is made a poison: whoever reads it gets infinite hidden states.
    good = jobs_of(tiny, 2, RECIPE)
    unused = 5
    assert not any(unused in example for job in good for example in job.examples)
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[unused] = float("inf")
        # The output layer is tied; a score of infinity would poison everybody.
        tiny.model.lm_head.weight = torch.nn.Parameter(tiny.model.lm_head.weight.clone(), requires_grad=False)
        tiny.model.lm_head.weight[unused] = 0.0
    reference = train(tiny, good, RECIPE, budget=100_000)
    poison = TrainingJob("poison", ((3, unused, 7, 9), (3, 4, 6, 9)))
    trainer = Trainer(tiny, RECIPE)
    trained = {a.key: a for a in trainer.train([*good, poison], tokens_per_step=100_000)}
    assert trained["poison"].factors is None
    for job in good:
        factors = trained[job.key].factors
        assert factors is not None
        assert worst_difference(delta_weights(factors, RECIPE), reference[job.key]) < 1e-4


def test_losses_fall_and_are_reported(tiny: BaseModel) -> None:
    trainer = Trainer(tiny, replace(RECIPE, epochs=6))
    seen = []
    (adapter,) = trainer.train(
        jobs_of(tiny, 1, RECIPE, first=2),
        tokens_per_step=1,
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert adapter.last_loss < 0.9 * adapter.first_loss
    assert adapter.steps == 5 * 6 == len(seen)
    assert seen[-1] == (30, 30)


def test_stacks_hold_the_budget_and_everyone() -> None:
    jobs = [TrainingJob(str(n), (tuple(range(10 + n % 50)),)) for n in range(200)]
    stacks = make_stacks(jobs, 300)
    assert sorted(j.key for s in stacks for j in s) == sorted(j.key for j in jobs)
    assert all(len(s) * max(j.tokens for j in s) <= 300 for s in stacks)
    assert len(make_stacks([TrainingJob("long", ((0,) * 1000,))], 300)) == 1


def test_a_model_without_the_targets_is_refused(tiny: BaseModel) -> None:
    with pytest.raises(ModelError, match=r"no linear module fc1.*down_proj"):
        Trainer(tiny, replace(RECIPE, targets=("fc1",)))


@pytest.mark.slow
def test_the_small_real_model_equals_peft() -> None:
    base = load_base_model(ModelConfig(dtype="float32", device="cpu"))
    recipe = replace(RECIPES["small"], epochs=1)
    jobs = jobs_of(base, 2, recipe, first=1)
    stacked = train(base, jobs, recipe, budget=100_000)
    for job in jobs:
        reference = train_alone_with_peft(base, job, recipe)
        differences = sorted(worst_difference({n: stacked[job.key][n]}, {n: reference[n]}) for n in reference)
        assert len(differences) == 90
        # AdamW turns a gradient that is zero up to rounding into a whole step of either sign, so in fp32 a few
        # matrices differ by more between any two orders of summation, and by how much depends on the threads.
        # In fp64 all 90 agree to 1e-4. A swapped or missing matrix, or a wrong scale, is off by about 1.
        assert differences[45] < 1e-4
        assert differences[-1] < 5e-2
