"""PEFT folders: what is written can be read, and folders that do not fit are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from prag_core.errors import AdapterError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import find_targets
from prag_core.llm.peft import export_peft, import_peft
from prag_core.recipe import RECIPES

RECIPE = replace(RECIPES["small"], last_layers=2)


@pytest.fixture
def layout(tiny_session: BaseModel) -> LoraLayout:
    return find_targets(tiny_session.model, RECIPE)[0]


@pytest.fixture
def factors(layout: LoraLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.tensor_shapes.items()}


def test_an_exported_adapter_can_be_imported(layout: LoraLayout, factors: dict, tmp_path: Path) -> None:
    export_peft(layout, factors, tmp_path / "peft", "base")
    again = import_peft(layout, tmp_path / "peft")
    assert again.keys() == factors.keys()
    assert all(torch.equal(again[name], factors[name]) for name in factors)


def test_an_adapter_saved_by_peft_can_be_imported(tiny: BaseModel, layout: LoraLayout, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=32, target_modules=list(layout.targets), layers_to_transform=[1, 2])
    model = get_peft_model(tiny.model, config)
    torch.nn.init.normal_(model.base_model.model.model.layers[2].mlp.up_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "peft")
    factors = import_peft(layout, tmp_path / "peft")
    up = model.base_model.model.model.layers[2].mlp.up_proj
    assert torch.equal(factors["up_proj.B"][1], up.lora_B["default"].weight)
    assert torch.equal(factors["up_proj.A"][1], up.lora_A["default"].weight)


def test_an_adapter_that_does_not_fit_is_refused(layout: LoraLayout, factors: dict, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nothing: not a readable PEFT adapter"):
        import_peft(layout, tmp_path / "nothing")
    folder = tmp_path / "peft"
    export_peft(layout, factors, folder, "base")
    with pytest.raises(AdapterError, match=r"rank 2, alpha / rank 16; the recipe has rank 2, 8"):
        import_peft(replace(layout, scale=8.0), folder)
    with pytest.raises(AdapterError, match=r"holds .*layers.1.mlp.*adapts gate_proj, .* of layers 2 to 2"):
        import_peft(replace(layout, layers=(2,)), folder)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lacks layer 2 up_proj.A and 0 more"):
        import_peft(layout, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(AdapterError, match=r"rank 2, alpha / rank 16"):
        import_peft(layout, folder)
