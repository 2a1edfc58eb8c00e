"""Training many adapters at once gives what training each alone gives, and what PEFT gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from prag_core.config import ModelConfig
from prag_core.errors import AdapterError, ModelError
from prag_core.llm.base_model import BaseModel, load_base_model
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, TrainedAdapter, find_targets, initial_factors
from prag_core.recipe import RECIPES, TrainRecipe
from prag_core.testing import FAMILIES, tiny_base_model
from prag_core.training.examples import TrainingExample, TrainingJob, training_examples
from prag_core.training.trainer import Trainer, check_distinct, has_learned, make_stacks
from tests.helpers.passages import make_augmentation, make_passage

RECIPE = replace(RECIPES["recall"], epochs=2)


def jobs_of(base: BaseModel, count: int, recipe: TrainRecipe, *, first: int = 0) -> list[TrainingJob]:
    jobs = []
    for number in range(first, first + count):
        passage = make_passage(number, words=5 + 7 * (number % 3))
        augmentation = make_augmentation(passage, pairs=1 + number % 3)
        examples = training_examples(base.tokenizer, passage, augmentation, recipe)
        jobs.append(TrainingJob(passage.key, examples))
    return jobs


def in_fp64(base: BaseModel) -> BaseModel:
    """Return the model in fp64, where AdamW does not turn rounding into whole steps, so that parity holds to 1e-6."""
    return replace(base, model=copy.deepcopy(base.model).double())


def job_of_ids(key: str, *examples: tuple[int, ...]) -> TrainingJob:
    return TrainingJob(key, tuple(TrainingExample(ids) for ids in examples))


def random_factors(layout: LoraLayout, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return factors that all differ, with B not zero, so that a swap of gate, up and down would show."""
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.02 * torch.randn(shape, generator=generator) for n, shape in layout.tensor_shapes.items()}


def use_norms_in_fp64(model: torch.nn.Module) -> None:
    """Make the norms of an fp64 model compute in fp64. transformers' own round to fp32, and AdamW enlarges that."""

    def forward(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(forward, module)


def train_alone_with_peft(
    base: BaseModel, job: TrainingJob, recipe: TrainRecipe, start: Factors | None = None
) -> dict[str, torch.Tensor]:
    """Train in a plain loop with PEFT and torch's AdamW, one example after the other. Return ΔW by `layer.target`."""
    layout, _ = find_targets(base.model, recipe)
    start = initial_factors(layout, recipe.seed) if start is None else start
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(layout.targets),
        layers_to_transform=list(layout.layers),
        lora_dropout=0.0,
    )
    model = get_peft_model(copy.deepcopy(base.model), config)
    if base.model.dtype == torch.float64:
        use_norms_in_fp64(model)
    adapted = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                layer, target = int(name.split("layers.")[1].split(".")[0]), name.rsplit(".", 1)[-1]
                place = layout.layers.index(layer)
                module.lora_A["default"].weight.copy_(start[f"{target}.A"][place])
                module.lora_B["default"].weight.copy_(start[f"{target}.B"][place])
                adapted[f"{layer}.{target}"] = module
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = recipe.rate_for(base.model.config.hidden_size)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay)
    size = recipe.examples_per_step
    begins = [*range(0, len(job.examples), size)] * recipe.epochs
    schedule = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=0, num_training_steps=len(begins))
    for begin in begins:
        optimizer.zero_grad()
        group = job.examples[begin : begin + size]
        for example in group:
            ids = torch.tensor([example.ids])
            # torch's own cross entropy in fp32 is off by 6e-6 on a vocabulary of 49,152 (CPU, 2.13); in fp64 it
            # is what both loops mean.
            scores = model(input_ids=ids).logits[0, example.scored_from - 1 : -1].double()
            (torch.nn.functional.cross_entropy(scores, ids[0, example.scored_from :]) / len(group)).backward()
        optimizer.step()
        schedule.step()
    return {name: module.get_delta_weight("default").detach() for name, module in adapted.items()}


def delta_weights(factors: Factors, layout: LoraLayout) -> dict[str, torch.Tensor]:
    out = {}
    for target in layout.targets:
        a, b = factors[f"{target}.A"], factors[f"{target}.B"]
        for place, layer in enumerate(layout.layers):
            out[f"{layer}.{target}"] = layout.scale * b[place] @ a[place]
    return out


def worst_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in right)


def train(
    base: BaseModel, jobs: Sequence[TrainingJob], recipe: TrainRecipe, budget: int, start: Factors | None = None
) -> dict[str, dict]:
    trainer = Trainer(base, recipe, start)
    trained = {a.key: delta_weights(a.factors, trainer.layout) for a in trainer.train(jobs, tokens_per_step=budget)}
    trainer.close()
    return trained


@pytest.mark.parametrize(("name", "examples_per_step"), [("paper", 1), ("paper", 2), ("recall", 1)])
def test_a_stack_equals_separate_training_with_peft(tiny: BaseModel, name: str, examples_per_step: int) -> None:
    recipe = replace(RECIPES[name], epochs=2, examples_per_step=examples_per_step)
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
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in tiny.model.modules())


def test_a_loss_that_is_not_finite_fails_its_own_passage_only(tiny: BaseModel) -> None:
    # Token 5 is made a poison: whoever reads it gets infinite hidden states.
    good = jobs_of(tiny, 2, RECIPE)
    unused = 5
    assert not any(unused in example.ids for job in good for example in job.examples)
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[unused] = float("inf")
        # The output layer is tied; a score of infinity would poison everybody.
        tiny.model.lm_head.weight = torch.nn.Parameter(tiny.model.lm_head.weight.clone(), requires_grad=False)
        tiny.model.lm_head.weight[unused] = 0.0
    reference = train(tiny, good, RECIPE, budget=100_000)
    poison = job_of_ids("poison", (3, unused, 7, 9), (3, 4, 6, 9))
    trainer = Trainer(tiny, RECIPE)
    trained = {a.key: a for a in trainer.train([*good, poison], tokens_per_step=100_000)}
    assert trained["poison"].factors is None
    assert trained["poison"].failure == "loss_not_finite"
    for job in good:
        factors = trained[job.key].factors
        assert factors is not None
        assert worst_difference(delta_weights(factors, trainer.layout), reference[job.key]) < 1e-4


def outcomes(base: BaseModel, jobs: Sequence[TrainingJob], recipe: TrainRecipe = RECIPE, budget: int = 100_000) -> dict:
    trainer = Trainer(base, recipe)
    made = {a.key: a for a in trainer.train(jobs, tokens_per_step=budget)}
    trainer.close()
    assert all((a.factors is None) == bool(a.failure) for a in made.values())
    return {key: adapter.failure for key, adapter in made.items()}


def test_an_adapter_that_training_left_as_it_was_is_not_trained(tiny: BaseModel) -> None:
    jobs = jobs_of(tiny, 2, RECIPE)
    assert set(outcomes(tiny, jobs, replace(RECIPE, learning_rate=1e-45)).values()) == {"nothing_learned"}
    assert set(outcomes(tiny, jobs, replace(RECIPE, learning_rate=1e-6)).values()) == {""}
    layout, _ = find_targets(tiny.model, RECIPE)
    start, zero = random_factors(layout), initial_factors(layout, 0)
    assert not has_learned(start, start)
    assert not has_learned(zero, start)
    assert not has_learned({n: f if n.endswith(".B") else f + 1 for n, f in start.items()}, start)
    assert has_learned({n: f + 1 if n == "up_proj.B" else f for n, f in start.items()}, start)


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-12}, {"alpha": 1e-35}, {"alpha": 1e-35, "weight_decay": 0.5}])
def test_rounding_and_weight_decay_are_nothing_learned(tiny: BaseModel, changes: dict[str, float]) -> None:
    """They change the factors of a start that is not zero, without any passage."""
    recipe = replace(RECIPE, **changes)
    layout, _ = find_targets(tiny.model, recipe)
    (job,) = jobs_of(tiny, 1, recipe)
    trainer = Trainer(tiny, recipe, random_factors(layout))
    (made,) = trainer.train([job], tokens_per_step=1)
    trainer.close()
    assert made.failure == "nothing_learned"


@pytest.mark.parametrize("budget", [1, 100_000])
def test_an_adapter_that_equals_another_is_not_trained(tiny: BaseModel, budget: int) -> None:
    first, second = jobs_of(tiny, 2, RECIPE)
    same = [first, TrainingJob("same", first.examples), second, TrainingJob("again", first.examples)]
    expected = {first.key: "", "same": "equals_another", second.key: "", "again": "equals_another"}
    assert outcomes(tiny, same, budget=budget) == expected


def test_of_equal_adapters_nobody_knows_which_passage_they_are_of(tiny: BaseModel) -> None:
    layout, _ = find_targets(tiny.model, RECIPE)
    one, other, third = (random_factors(layout, seed) for seed in (1, 2, 3))
    same_b = {name: factor if name.endswith(".B") else factor + 1 for name, factor in one.items()}

    def trained(**factors: dict[str, torch.Tensor]) -> list[TrainedAdapter]:
        return [TrainedAdapter(key, made, 1, 1, 1.0, 1.0, 1.0) for key, made in factors.items()]

    seen: set[str] = set()
    first = check_distinct(trained(a=one, b=same_b, c=other), seen)
    assert {a.key: a.failure for a in first} == {"a": "equals_another", "b": "equals_another", "c": ""}
    later = list(check_distinct([*trained(d=other, e=third), TrainedAdapter("f", None, 1, 1, 1, 1, 1, "x")], seen))
    assert {a.key: a.failure for a in later} == {"d": "equals_another", "e": "", "f": "x"}
    assert [a.key for a in later if a.factors is not None] == ["e"]


def test_losses_fall_and_are_reported(tiny: BaseModel) -> None:
    trainer = Trainer(tiny, replace(RECIPE, epochs=6))
    seen = []
    (adapter,) = trainer.train(
        jobs_of(tiny, 1, RECIPE, first=2),
        tokens_per_step=1,
        on_step=lambda done, total, _: seen.append((done, total)),
    )
    assert adapter.last_loss < 0.9 * adapter.first_loss
    assert adapter.steps == 3 * 6 == len(seen)
    assert seen[-1] == (18, 18)


def test_stacks_are_within_the_budget_and_hold_all_jobs() -> None:
    jobs = [job_of_ids(str(n), tuple(range(10 + n % 50))) for n in range(200)]
    stacks = make_stacks(jobs, 300)
    assert sorted(j.key for s in stacks for j in s) == sorted(j.key for j in jobs)
    assert all(len(s) * max(j.tokens for j in s) <= 300 for s in stacks)
    assert len(make_stacks([job_of_ids("long", (0,) * 1000)], 300)) == 1


def test_a_model_without_the_targets_is_refused(tiny: BaseModel) -> None:
    with pytest.raises(ModelError, match=r"no linear module fc1.*down_proj"):
        Trainer(tiny, replace(RECIPE, targets=("fc1",)))
    with pytest.raises(ModelError, match=r"last_layers = 9, but the base model has 3 layers"):
        Trainer(tiny, replace(RECIPE, last_layers=9))


def test_a_mixture_of_experts_is_refused(tiny: BaseModel) -> None:
    tiny.model.model.layers[1].mlp.expert = copy.deepcopy(tiny.model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"several modules down_proj, gate_proj, up_proj in one layer"):
        Trainer(tiny, RECIPE)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_recipe_equals_peft(tiny_session: BaseModel, data: st.DataObject) -> None:
    layout_free = replace(
        RECIPES["paper"],
        rank=data.draw(st.integers(1, 4)),
        alpha=data.draw(st.sampled_from([1.0, 8.0, 32.0])),
        targets=data.draw(
            st.sampled_from([("gate_proj", "up_proj", "down_proj"), ("down_proj",), ("up_proj", "q_proj", "o_proj")])
        ),
        last_layers=data.draw(st.sampled_from([None, 1, 2])),
        learning_rate=data.draw(st.sampled_from([1e-4, 1e-3])),
        weight_decay=data.draw(st.sampled_from([0.0, 0.1])),
        epochs=data.draw(st.integers(1, 3)),
        schedule=data.draw(st.sampled_from(["constant", "linear"])),
    )
    shapes = data.draw(st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=3), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    jobs = []
    for number, lengths in enumerate(shapes):
        examples = []
        for length in lengths:
            ids = torch.randint(3, 200, (length,), generator=generator).tolist()
            examples.append(TrainingExample(tuple(ids), data.draw(st.integers(1, length - 1))))
        jobs.append(TrainingJob(str(number), tuple(examples)))
    base = in_fp64(tiny_session)
    start = random_factors(find_targets(base.model, layout_free)[0])
    stacked = train(base, jobs, layout_free, data.draw(st.sampled_from([1, 60, 10_000])), start)
    # AdamW divides a gradient by about its own size: where a gradient is near its eps of 1e-8, rounding shows.
    for job in jobs:
        assert worst_difference(stacked[job.key], train_alone_with_peft(base, job, layout_free, start)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_each_model_family_equals_peft(tmp_path: Path, family: str) -> None:
    base = in_fp64(tiny_base_model(tmp_path, family=family))
    layout, _ = find_targets(base.model, RECIPE)
    start = random_factors(layout)
    jobs = jobs_of(base, 2, RECIPE)
    stacked = train(base, jobs, RECIPE, 100_000, start)
    assert len(stacked[jobs[0].key]) == len(layout.layers) * len(layout.targets)
    for job in jobs:
        assert worst_difference(stacked[job.key], train_alone_with_peft(base, job, RECIPE, start)) < 1e-6


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_examples_longer_than_a_sliding_window_equal_peft(tmp_path: Path, family: str) -> None:
    base = in_fp64(tiny_base_model(tmp_path, family=family))
    start = random_factors(find_targets(base.model, RECIPE)[0])
    job = job_of_ids("long", tuple(n % 200 for n in range(3, 3 + 150)))
    assert base.model.config.sliding_window < 150
    stacked = train(base, [job], RECIPE, 100_000, start)
    assert worst_difference(stacked["long"], train_alone_with_peft(base, job, RECIPE, start)) < 1e-6


def test_passages_that_end_at_different_steps_keep_their_last_state(tiny: BaseModel) -> None:
    """Their rows are updated on, by momentum, until the stack is done."""
    base = in_fp64(tiny)
    example = jobs_of(base, 1, RECIPE)[0].examples[0]
    jobs = [TrainingJob(str(n), tuple(replace(example, ids=(n, *example.ids)) for _ in range(n))) for n in (3, 1, 2)]
    start = random_factors(find_targets(base.model, RECIPE)[0])
    stacked = train(base, jobs, RECIPE, 100_000, start)
    for job in jobs:
        assert worst_difference(stacked[job.key], train_alone_with_peft(base, job, RECIPE, start)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_activation_checkpointing_saves_memory_and_changes_nothing(tmp_path: Path, family: str) -> None:
    base = in_fp64(tiny_base_model(tmp_path, family=family))
    recipe = replace(RECIPE, last_layers=2)
    jobs = jobs_of(base, 3, recipe)
    reference = train(base, jobs, recipe, budget=100_000)
    forwards, steps = [], []
    handle = base.model.get_decoder().layers[-1].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    trainer = Trainer(base, recipe, checkpoint=True)
    adapters = list(trainer.train(jobs, tokens_per_step=100_000, on_step=lambda *_: steps.append(1)))
    trainer.close()
    handle.remove()
    assert len(forwards) == 2 * len(steps)
    for adapter in adapters:
        assert adapter.factors is not None
        assert worst_difference(delta_weights(adapter.factors, trainer.layout), reference[adapter.key]) < 1e-9
    assert not any(
        module.training or getattr(module, "gradient_checkpointing", False) for module in base.model.modules()
    )


def test_running_out_of_memory_halves_the_stacks_and_loses_nothing(tiny: BaseModel) -> None:
    jobs = jobs_of(tiny, 6, RECIPE)
    reference = train(tiny, jobs, RECIPE, budget=100_000)
    limit = max(job.longest for job in jobs) + 10
    too_much = job_of_ids("too much", tuple(range(3, 3 + limit)))

    def short_of_memory(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        if keywords["input_ids"].numel() >= limit:
            raise torch.OutOfMemoryError("asked for more than there is")

    handle = tiny.model.get_decoder().register_forward_pre_hook(short_of_memory, with_kwargs=True)
    trainer = Trainer(tiny, RECIPE)
    trained = {a.key: a for a in trainer.train([*jobs, too_much], tokens_per_step=100_000)}
    handle.remove()
    assert trained["too much"].failure == "out_of_memory"
    assert trained["too much"].factors is None
    for job in jobs:
        factors = trained[job.key].factors
        assert factors is not None
        assert worst_difference(delta_weights(factors, trainer.layout), reference[job.key]) < 1e-4


def test_a_trainer_remembers_how_many_tokens_fit(tiny: BaseModel) -> None:
    first, second = jobs_of(tiny, 4, RECIPE), jobs_of(tiny, 4, RECIPE, first=5)
    sizes: list[int] = []

    def short_of_memory(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    handle = tiny.model.get_decoder().register_forward_pre_hook(short_of_memory, with_kwargs=True)
    trainer = Trainer(tiny, RECIPE)
    assert all(a.factors is not None for a in trainer.train(first, tokens_per_step=100_000))
    assert max(sizes) == 4
    sizes.clear()
    assert all(a.factors is not None for a in trainer.train(second, tokens_per_step=100_000))
    handle.remove()
    assert max(sizes) <= 2


def test_an_error_that_is_not_for_want_of_memory_is_raised(tiny: BaseModel) -> None:
    def fail(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    handle = tiny.model.get_decoder().register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(Trainer(tiny, RECIPE).train(jobs_of(tiny, 2, RECIPE), tokens_per_step=100_000))
    handle.remove()


def test_a_start_that_does_not_fit_is_refused(tiny: BaseModel) -> None:
    start = random_factors(find_targets(tiny.model, replace(RECIPE, rank=3))[0])
    with pytest.raises(AdapterError, match=r"adapter start: down_proj.A has shape"):
        Trainer(tiny, RECIPE, start)


@pytest.mark.slow
def test_the_small_real_model_equals_peft() -> None:
    base = load_base_model(ModelConfig(dtype="float32", device="cpu"))
    recipe = replace(RECIPES["recall"], epochs=1)
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
