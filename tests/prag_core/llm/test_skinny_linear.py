"""FewRowsLinear computes the same products as a plain linear module, for each shape that occurs in a model."""

import pytest
import torch
from torch import nn

from prag_core.llm.base_model import BaseModel
from prag_core.llm.skinny_linear import FewRowsLinear, few_rows, use_few_rows


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (1, 5), (4, 16), (2, 33), (64,), (65,), (2, 3, 4)])
def test_products_equal_those_of_a_plain_linear_module(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(24, 40, bias=False)
    turned = nn.Linear(24, 40, bias=False)
    turned.load_state_dict(plain.state_dict())
    use_few_rows(turned)
    x = torch.randn(*shape, 24)
    assert type(turned) is FewRowsLinear
    torch.testing.assert_close(turned(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not few_rows(torch.bfloat16, 1536), reason="this processor has no arithmetic in bf16")
@pytest.mark.parametrize("shape", [(1, 1), (15, 1), (16, 1), (3, 16), (65,)])
def test_products_in_bf16_equal_those_of_a_plain_linear_module(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(1536, 40, bias=False, dtype=torch.bfloat16)
    turned = nn.Linear(1536, 40, bias=False, dtype=torch.bfloat16)
    turned.load_state_dict(plain.state_dict())
    use_few_rows(turned)
    x = torch.randn(*shape, 1536, dtype=torch.bfloat16)
    y = turned(x)
    assert type(turned) is FewRowsLinear
    assert y.is_contiguous()
    torch.testing.assert_close(y, plain(x), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("amx", "avx512", "inputs", "first"),
    [(True, True, 1536, 1), (False, True, 1536, 16), (True, True, 576, None), (False, False, 1536, None)],
)
def test_bf16_is_turned_only_where_the_processor_gains(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, inputs: int, first: int | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    module = nn.Linear(inputs, 6, bias=False, dtype=torch.bfloat16)
    use_few_rows(module)
    assert min(module.rows if isinstance(module, FewRowsLinear) else [], default=None) == first


def test_no_rows_give_no_rows() -> None:
    module = nn.Linear(4, 6, bias=False)
    use_few_rows(module)
    assert module(torch.zeros(0, 4)).shape == (0, 6)


def test_gradients_equal_those_of_a_plain_linear_module() -> None:
    plain = nn.Linear(8, 12, bias=False)
    turned = nn.Linear(8, 12, bias=False)
    turned.load_state_dict(plain.state_dict())
    use_few_rows(turned)
    x, y = (torch.ones(3, 8, requires_grad=True) for _ in range(2))
    plain(x).square().sum().backward()
    turned(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(turned.weight.grad, plain.weight.grad)


def test_modules_with_a_bias_or_another_dtype_or_class_are_left_as_they_are() -> None:
    class Special(nn.Linear):
        """A module that somebody's model brings along."""

    modules = nn.ModuleList(
        [nn.Linear(2, 3), nn.Linear(2, 3, bias=False).double(), Special(2, 3, bias=False), nn.Embedding(2, 3)]
    )
    before = [type(module) for module in modules]
    use_few_rows(modules)
    assert [type(module) for module in modules] == before


def test_a_loaded_model_uses_them_and_decodes_one_row_as_it_does_many(tiny_session: BaseModel) -> None:
    kinds = {type(module) for module in tiny_session.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {FewRowsLinear}
    ids = torch.arange(5, 5 + max(few_rows(torch.float32, 32)))
    with torch.inference_mode():
        alone = torch.cat([tiny_session.model(input_ids=row[None, None]).logits[0] for row in ids])
        together = tiny_session.model(input_ids=ids[:, None]).logits[:, 0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
