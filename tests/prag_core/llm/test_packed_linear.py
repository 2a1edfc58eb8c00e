"""PackedLinear computes the same products as a plain linear module, for each shape that occurs in a model."""

import copy

import pytest
import torch
from torch import nn

from prag_core.llm.base_model import BaseModel
from prag_core.llm.packed_linear import PackedLinear, pack_linear

DTYPES = [torch.float32, torch.bfloat16]


def pair(dtype: torch.dtype, inputs: int = 24) -> tuple[nn.Linear, nn.Linear]:
    """Return a plain module and a packed one with the same weights."""
    plain = nn.Linear(inputs, 40, bias=False, dtype=dtype)
    packed = copy.deepcopy(plain)
    pack_linear(packed)
    if type(packed) is not PackedLinear:
        pytest.skip(f"this processor does not multiply {dtype}")
    return plain, packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (1, 5), (4, 16), (2, 33), (64,), (65,), (2, 3, 4), (0,)])
def test_products_equal_those_of_a_plain_linear_module(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    x = torch.randn(*shape, 24, dtype=dtype)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    with torch.inference_mode():
        y = packed(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, plain(x).detach(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_by_columns_or_apart_are_multiplied_alike(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    with torch.inference_mode():
        for x in (torch.randn(24, 7, dtype=dtype).T, torch.randn(5, 3, 24, dtype=dtype)[:, -1:]):
            torch.testing.assert_close(packed(x), plain(x), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_change_are_packed_again(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    with torch.inference_mode():
        packed(x)
    with torch.no_grad():
        for module in (plain, packed):
            module.weight += 1.0
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=2**-7, atol=2**-7)


def test_gradients_equal_those_of_a_plain_linear_module() -> None:
    plain, packed = pair(torch.float32)
    x, y = (torch.ones(3, 24, requires_grad=True) for _ in range(2))
    plain(x).square().sum().backward()
    packed(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(packed.weight.grad, plain.weight.grad)


def test_modules_with_a_bias_or_another_dtype_or_class_are_left_as_they_are() -> None:
    class Special(nn.Linear):
        """A module that somebody's model brings along."""

    modules = nn.ModuleList(
        [nn.Linear(2, 3), nn.Linear(2, 3, bias=False).double(), Special(2, 3, bias=False), nn.Embedding(2, 3)]
    )
    before = [type(module) for module in modules]
    pack_linear(modules)
    assert [type(module) for module in modules] == before


def test_a_loaded_model_uses_them_and_decodes_one_row_as_it_does_many(tiny_session: BaseModel) -> None:
    kinds = {type(module) for module in tiny_session.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {PackedLinear}
    ids = torch.arange(5, 69)
    with torch.inference_mode():
        alone = torch.cat([tiny_session.model(input_ids=row[None, None]).logits[0] for row in ids])
        together = tiny_session.model(input_ids=ids[:, None]).logits[:, 0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
