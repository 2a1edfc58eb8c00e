"""PEFT folders: an export does in PEFT what it does here, and what is not exactly understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from prag_core.errors import AdapterError, InputError
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Injector, find_targets, linear_shapes
from prag_core.llm.model_facts import ModelFacts
from prag_core.llm.peft import PeftBase, export_peft, import_peft, peft_base
from prag_core.recipe import RECIPES, TrainRecipe
from prag_core.testing import FAMILIES, write_tiny_model
from tests.helpers.adapters import stack_rows

RECIPE = replace(RECIPES["recall"], last_layers=2)


@pytest.fixture
def layout(tiny_session: BaseModel) -> LoraLayout:
    return find_targets(tiny_session.model, RECIPE)[0]


@pytest.fixture
def base(tiny_model_folder: Path) -> PeftBase:
    return peft_base(str(tiny_model_folder))


def random_factors(layout: LoraLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in layout.tensor_shapes.items()}


@pytest.fixture
def factors(layout: LoraLayout) -> dict[str, torch.Tensor]:
    return random_factors(layout)


# ---- export


def logits_here(model: Any, recipe: TrainRecipe, factors: dict, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a model with and without an adapter, as answering computes them."""
    injector = Injector(model, recipe)
    rows = stack_rows(injector.layout, [[(factors, 1.0)]])
    with torch.no_grad(), injector.active(rows):
        adapted = model(ids).logits
    injector.close()
    with torch.no_grad():
        return adapted, model(ids).logits


def check_in_peft(folder: Path, model_folder: Path, recipe: TrainRecipe) -> None:
    """Check that an exported adapter changes the logits in PEFT as it does here, and can be imported."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    layout = find_targets(model, recipe)[0]
    factors = random_factors(layout)
    base = PeftBase(str(model_folder), str(model_folder), ModelFacts("fingerprint", linear_shapes(model)))
    export_peft(layout, factors, folder, base)
    ids = torch.arange(3, 9)[None]
    here, bare = logits_here(model, recipe, factors, ids)
    with torch.no_grad():
        there = PeftModel.from_pretrained(model, str(folder)).eval()(ids).logits
    assert (here - bare).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
    again = import_peft(layout, folder, base)
    assert all(torch.equal(again[name], factors[name]) for name in factors)


@pytest.mark.filterwarnings("error:.*adapter keys")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_target_of_a_family_does_in_peft_what_it_does_here(family: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", family=family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear_shapes(model) if ".layers." in name})
    assert {"o_proj", "down_proj"} <= {*targets}
    for chosen in (*((target,) for target in targets), tuple(targets)):
        check_in_peft(tmp_path / "-".join(chosen), folder, replace(RECIPE, targets=chosen))


def test_modules_under_other_names_than_llamas_are_exported(tmp_path: Path) -> None:
    """In GPT-NeoX, the layers are under `gpt_neox` and the attention's modules under `attention`."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path / "model")
    for target in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"):
        check_in_peft(tmp_path / target, tmp_path / "model", replace(RECIPE, targets=(target,)))


# ---- import


def test_an_adapter_saved_by_peft_can_be_imported(
    tiny: BaseModel, tmp_path: Path, layout: LoraLayout, base: PeftBase
) -> None:
    config = LoraConfig(r=2, lora_alpha=32, target_modules=list(layout.targets), layers_to_transform=[1, 2])
    model = get_peft_model(tiny.model, config)
    torch.nn.init.normal_(model.base_model.model.model.layers[2].mlp.up_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "peft")
    factors = import_peft(layout, tmp_path / "peft", peft_base(tiny.name))
    up = model.base_model.model.model.layers[2].mlp.up_proj
    assert torch.equal(factors["up_proj.B"][1], up.lora_B["default"].weight)
    assert torch.equal(factors["up_proj.A"][1], up.lora_A["default"].weight)


def test_each_field_of_the_installed_peft_is_known(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path
) -> None:
    export_peft(layout, factors, tmp_path, base)
    config = {
        **LoraConfig(r=2, lora_alpha=32).to_dict(),
        **json.loads((tmp_path / "adapter_config.json").read_text()),
        "peft_type": "LORA",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    import_peft(layout, tmp_path, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"up_proj": 64}}, 'has alpha_pattern = {"up_proj": 64}, which is not supported'),
        ({"rank_pattern": {"up_proj": 4}}, 'has rank_pattern = {"up_proj": 4}'),
        ({"use_dora": True}, "has use_dora = true"),
        ({"use_rslora": True}, "has use_rslora = true"),
        ({"bias": "all"}, 'has bias = "all"'),
        ({"bias": "lora_only"}, 'has bias = "lora_only"'),
        ({"lora_bias": True}, "has lora_bias = true"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out = true"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"exclude_modules": ["down_proj"]}, "has exclude_modules"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"target_parameters": ["w"]}, "has target_parameters"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"use_qalora": True}, "has use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "has use_bdlora"),
        ({"init_lora_weights": "pissa"}, 'has init_lora_weights = "pissa"'),
        ({"init_lora_weights": "loftq"}, 'has init_lora_weights = "loftq"'),
        ({"init_lora_weights": 1}, "has init_lora_weights = 1"),
        ({"task_type": "SEQ_CLS"}, 'has task_type = "SEQ_CLS"'),
        ({"peft_type": "LOHA"}, 'has peft_type = "LOHA"'),
        ({"peft_type": None}, "does not say peft_type"),
        ({"revision": "v2"}, 'has revision = "v2"'),
        ({"layers_pattern": "blocks"}, 'has layers_pattern = "blocks"'),
        ({"of_a_later_peft": True}, "has of_a_later_peft = true"),
        ({"lora_alpha": None}, "does not say lora_alpha"),
        ({"r": None}, "does not say r"),
        ({"r": "2"}, r'has r = "2" and lora_alpha = 32.0; both are numbers'),
        ({"r": True}, "has r = true"),
        ({"r": 0}, "has r = 0"),
        ({"lora_alpha": "32"}, 'lora_alpha = "32"'),
        ({"lora_alpha": float("nan")}, "alpha / rank nan; the recipe has rank 2, 16"),
        ({"lora_alpha": 16}, "rank 2, alpha / rank 8; the recipe has rank 2, 16"),
        ({"r": 4, "lora_alpha": 64}, "rank 4, alpha / rank 16; the recipe has rank 2, 16"),
        ({"target_modules": None}, "does not say target_modules"),
        ({"target_modules": ["up_proj"]}, r'has target_modules = \["up_proj"\].*; of .*, the recipe says the opposite'),
        ({"target_modules": "all-linear"}, 'has target_modules = "all-linear"'),
        ({"target_modules": "("}, r'has target_modules = "\("'),
        ({"target_modules": 3}, "has target_modules = 3"),
        ({"target_modules": {"gate_proj": 1, "up_proj": 1, "down_proj": 1}}, "has target_modules = {"),
        ({"target_modules": "([a-z._0-9]+)+!", "layers_to_transform": None}, "has target_modules"),
        ({"target_modules": ".*" * 20 + "!", "layers_to_transform": None}, "has target_modules"),
        ({"layers_to_transform": [True, 2]}, r"layers_to_transform = \[true, 2\]"),
        ({"lora_alpha": 10**400}, "has r = 2 and lora_alpha = 1000"),
        ({"r": 10**400}, "has r = 1000"),
        ({"layers_to_transform": None}, r"layers_to_transform = null; of model\.layers\.0\.mlp"),
        ({"layers_to_transform": 2}, r"layers_to_transform = 2; of model\.layers\.1\.mlp"),
        ({"layers_to_transform": [0, 1, 2]}, r"of model\.layers\.0\.mlp"),
    ],
)
def test_a_field_that_is_not_exactly_understood_is_refused_by_name(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path, changes: dict, message: str
) -> None:
    export_peft(layout, factors, tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(AdapterError, match=message) as raised:
        import_peft(layout, tmp_path, base)
    assert raised.value.remedy


def test_target_modules_may_be_a_pattern_or_full_names(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path
) -> None:
    export_peft(layout, factors, tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [name for name in base.facts.linear if ".mlp." in name and not name.startswith("model.layers.0.")]
    for targets in (r".*\.[12]\.mlp\.(gate|up|down)_proj", names):
        changed = {**config, "target_modules": targets, "layers_to_transform": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        assert import_peft(layout, tmp_path, base).keys() == factors.keys()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: dict | None = None) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata)


def test_another_base_model_is_refused(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path, tiny_model_folder: Path
) -> None:
    folder = tmp_path / "peft"
    other = write_tiny_model(tmp_path / "other", seed=1)
    export_peft(layout, factors, folder, peft_base(str(other)))
    with pytest.raises(AdapterError, match=r"base_model_name_or_path = .*other.*; model\.name is .*tiny-model"):
        import_peft(layout, folder, base)
    # As PEFT would save it: only the name says which base model it is.
    rewrite(folder, lambda tensors: None)
    with pytest.raises(AdapterError, match=r"base_model_name_or_path = .*other"):
        import_peft(layout, folder, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, understood in (
        ("somebody/model", False),
        (str(tiny_model_folder), True),
        (str(tmp_path), False),
        (3, False),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        if understood:
            import_peft(layout, folder, base)
        else:
            with pytest.raises(AdapterError, match="base_model_name_or_path ="):
                import_peft(layout, folder, base)
    on_hub = replace(base, name="somebody/model", location="somebody/model")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "somebody/model"}))
    import_peft(layout, folder, on_hub)


@pytest.mark.parametrize("name", ["m" * 5000, "m\0", "~nobody-has-this-name/m"])
def test_a_base_model_whose_name_no_path_can_be_is_another_one(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path, name: str
) -> None:
    export_peft(layout, factors, tmp_path, replace(base, location=name))
    rewrite(tmp_path, lambda _: None)
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        import_peft(layout, tmp_path, base)


@pytest.mark.parametrize("name", ["file", "file/x", "n" * 300])
def test_a_folder_that_cannot_be_written_is_named(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"{name}: cannot be written"):
        export_peft(layout, factors, tmp_path / name, base)


def test_an_export_knows_its_base_model_wherever_that_lies(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path
) -> None:
    export_peft(layout, factors, tmp_path, replace(base, location="/home/somebody/elsewhere"))
    assert import_peft(layout, tmp_path, base).keys() == factors.keys()


def test_an_adapter_that_does_not_fit_is_refused(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"nothing: not a readable PEFT adapter"):
        import_peft(layout, tmp_path / "nothing", base)
    folder = tmp_path / "peft"

    def refused(message: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        export_peft(layout, factors, folder, base)
        rewrite(folder, change, {"base_model": base.facts.fingerprint})
        with pytest.raises(AdapterError, match=message):
            import_peft(layout, folder, base)

    up = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    misplaced = "base_model.model.model.layers.2.mlp.q_proj.lora_A.weight"
    refused(rf"lacks {up} and 0 more", lambda tensors: tensors.pop(up))
    refused(rf"lacks {up} and 0 more", lambda tensors: tensors.update({misplaced: tensors.pop(up)}))
    refused(
        rf"holds {misplaced} and 0 more, but the recipe adapts gate_proj",
        lambda t: t.update({misplaced: t[up].clone()}),
    )
    refused(
        r"holds base_model.*embed_tokens",
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": t[up].clone()}),
    )
    refused(
        rf"{up} is \[2, 31\] torch.float32; the recipe has \[2, 32\]",
        lambda t: t.update({up: t[up][:, 1:].contiguous()}),
    )
    refused(rf"{up} is .*; the recipe has \[2, 32\] in floating point", lambda t: t.update({up: t[up].to(torch.int8)}))
    refused(r"values that are not finite", lambda t: t[up].fill_(float("nan")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable PEFT adapter"),
        ("[" * 100_000, "not a readable PEFT adapter"),
        ("[]", "holds no settings"),
        ('{"r": 2, "r": 4}', "comes twice in an object"),
    ],
)
def test_a_damaged_configuration_is_refused(
    layout: LoraLayout, factors: dict, base: PeftBase, tmp_path: Path, text: str, message: str
) -> None:
    export_peft(layout, factors, tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        import_peft(layout, tmp_path, base)
