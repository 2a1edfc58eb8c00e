"""Injection: each row gets the sum of its own adapters, and nothing from its neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prag_core.errors import AdapterError, ModelError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import (
    Injector,
    TrainedAdapter,
    check_factors,
    find_targets,
    flatten_adapter,
    initial_factors,
    merge_adapter,
    stack_adapters,
)
from prag_core.recipe import RECIPES
from prag_core.testing import FAMILIES, tiny_base_model
from tests.helpers.adapters import random_adapter, stack_rows

RECIPE = RECIPES["recall"]


def with_dense_sum(base: BaseModel, layout: LoraLayout, row: list, ids: torch.Tensor) -> torch.Tensor:
    """The oracle: add Σ w·scale·B·A to the weights themselves, and remove it again."""
    _, modules = find_targets(base.model, RECIPE)
    before = {place: module.weight.clone() for place, module in modules.items()}
    with torch.no_grad():
        for (layer, target), module in modules.items():
            for adapter, weight in row:
                b, a = adapter[f"{target}.B"][layer], adapter[f"{target}.A"][layer]
                module.weight += (weight * layout.scale * b @ a).to(module.weight.dtype)
        logits = base.model(input_ids=ids).logits
        for place, module in modules.items():
            module.weight.copy_(before[place])
    return logits


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 0.5, 0.25])), max_size=3), min_size=1, max_size=4
    )
)
def test_each_row_of_a_mixed_batch_has_its_own_sum(tiny_session: BaseModel, plan: list) -> None:
    check_mixed_batch(tiny_session, plan)


def test_a_merged_adapter_is_in_the_weights_for_good(tmp_path: Path) -> None:
    base = tiny_base_model(tmp_path)
    layout, _ = find_targets(base.model, RECIPE)
    adapter = random_adapter(layout, 1)
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
        expected = with_dense_sum(base, layout, [(adapter, 1.0)], ids)
        merge_adapter(base.model, RECIPE, adapter)
        merged = base.model(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, bare, atol=1e-3)
    with pytest.raises(AdapterError, match="the adapter to merge"):
        merge_adapter(base.model, RECIPE, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_work_in_each_model_family(tmp_path: Path, family: str) -> None:
    check_mixed_batch(tiny_base_model(tmp_path, family=family), [[(1, 1.0), (2, 0.5)], [], [(3, 1.0)]])


def check_mixed_batch(base: BaseModel, plan: list) -> None:
    injector = Injector(base.model, RECIPE)
    try:
        layout = injector.layout
        rows = [[(random_adapter(layout, seed), weight) for seed, weight in row] for row in plan]
        ids = torch.arange(3, 3 + 7 * len(rows)).remainder(250).reshape(len(rows), 7)
        with torch.no_grad(), injector.active(stack_rows(layout, rows)):
            mixed = base.model(input_ids=ids).logits
        for i, row in enumerate(rows):
            assert torch.allclose(mixed[i], with_dense_sum(base, layout, row, ids[i : i + 1])[0], atol=1e-4)
    finally:
        injector.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_holds_the_very_values_of_its_adapters(tiny_session: BaseModel, dtype: torch.dtype) -> None:
    """Rows with three adapters, none and one: the values as they are in the model's dtype, else zeros."""
    layout, _ = find_targets(tiny_session.model, RECIPE)
    rows = [[(1, 1.0), (2, 0.5), (3, 2.0)], [], [(2, 0.25)]]
    factors = {seed: random_adapter(layout, seed) for seed in (1, 2, 3)}
    flat = {seed: flatten_adapter(layout, each, dtype=dtype) for seed, each in factors.items()}
    stack = stack_adapters(layout, [[(flat[seed], weight) for seed, weight in row] for row in rows], dtype=dtype)
    assert stack is not None
    for i, row in enumerate(rows):
        for j in range(3):
            place = slice(j * layout.rank, (j + 1) * layout.rank)
            weight = row[j][1] if j < len(row) else 0.0
            assert stack.weights[i, place].tolist() == [weight * layout.scale] * layout.rank
            for target, (a, b) in stack.factors.items():
                wanted_a, wanted_b = (factors[row[j][0] if j < len(row) else 1][f"{target}.{side}"] for side in "AB")
                if j >= len(row):
                    wanted_a, wanted_b = torch.zeros_like(wanted_a), torch.zeros_like(wanted_b)
                assert torch.equal(a[:, i, place], wanted_a.to(dtype))
                assert torch.equal(b[:, i, place], wanted_b.mT.to(dtype))


def test_outside_the_context_the_model_is_bare(tiny: BaseModel) -> None:
    ids = torch.arange(3, 13)[None]
    bare = tiny.model(input_ids=ids).logits
    injector = Injector(tiny.model, RECIPE)
    rows = stack_rows(injector.layout, [[(random_adapter(injector.layout, 1), 1.0)]])
    with injector.active(rows):
        changed = tiny.model(input_ids=ids).logits
    assert not torch.allclose(bare, changed)
    assert torch.equal(tiny.model(input_ids=ids).logits, bare)
    injector.close()
    assert torch.equal(tiny.model(input_ids=ids).logits, bare)


def test_each_target_of_each_layer_is_adapted(tiny: BaseModel) -> None:
    injector = Injector(tiny.model, RECIPE)
    assert sum(bool(module._forward_hooks) for module in tiny.model.modules()) == 3 * 3
    assert injector.layout.parameters == 3 * 2 * (3 * 32 + 3 * 48)
    injector.close()


def test_an_error_about_a_missing_target_names_the_modules_that_exist(tiny: BaseModel) -> None:
    with pytest.raises(ModelError, match=r"no linear module gate_up_proj.*gate_proj.*up_proj"):
        find_targets(tiny.model, replace(RECIPE, targets=("gate_up_proj", "down_proj")))


def test_all_adapters_start_from_the_same_factors_and_change_nothing(tiny: BaseModel) -> None:
    layout, _ = find_targets(tiny.model, RECIPE)
    one, same, other = initial_factors(layout, 0), initial_factors(layout, 0), initial_factors(layout, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["up_proj.A"], other["up_proj.A"])
    assert all(bool((one[name] == 0).all()) == name.endswith(".B") for name in one)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.pop("up_proj.A"), "has tensors"),
        (lambda f: f.update({"up_proj.A": f["up_proj.A"][:-1]}), "has shape"),
        (lambda f: f["up_proj.B"].fill_(float("nan")), "not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny: BaseModel, damage, message: str) -> None:
    layout, _ = find_targets(tiny.model, RECIPE)
    factors = initial_factors(layout, 0)
    damage(factors)
    with pytest.raises(AdapterError, match=f"adapter k: .*{message}"):
        check_factors(layout, factors, "k")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(tiny_session: BaseModel, value: float, dtype: torch.dtype) -> None:
    layout, _ = find_targets(tiny_session.model, RECIPE)
    for name in layout.tensor_shapes:
        factors = {other: tensor.to(dtype) for other, tensor in random_adapter(layout, 1).items()}
        check_factors(layout, factors, "k")
        factors[name].view(-1)[-1] = value
        with pytest.raises(AdapterError, match=f"{name} holds values that are not finite"):
            check_factors(layout, factors, "k")


def test_a_trained_adapter_is_shown_without_its_tensors() -> None:
    shown = repr(TrainedAdapter("k", {"down_proj.A": torch.ones(1, 2, 3)}, 5, 700, 3.5, 0.1, 2.0))
    assert "last_loss=0.1" in shown
    assert "tensor" not in shown
