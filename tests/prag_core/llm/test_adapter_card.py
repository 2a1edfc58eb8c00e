"""The card of an exported adapter: its header is one that hubs read, and its code asks what the engine asks."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from prag_core.config import AugmentConfig, augment_recipe
from prag_core.inference.engine import Engine
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.adapter_card import AdapterCard, card_text, write_card
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, find_targets
from prag_core.llm.peft import PeftBase, export_peft, peft_base
from prag_core.prompts import final_answer
from prag_core.recipe import RECIPES, Recipe
from prag_core.records import Hit, Template
from tests.helpers.adapters import random_adapter
from tests.helpers.passages import make_passage

PASSAGE = make_passage(7)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class OneAdapter:
    """The adapter of every passage."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def get(self, key: str) -> Factors:
        return self.factors


def make_card(base: PeftBase, template: Template) -> AdapterCard:
    train = replace(RECIPES["recall"], template=template)
    recipe = Recipe(base.facts.fingerprint, augment_recipe(AugmentConfig(), base.facts.fingerprint, train), train)
    return AdapterCard(recipe, PASSAGE.key, PASSAGE.title, PASSAGE.sources, 40, 900, 2.5, 0.125, 3.25)


def header_of(text: str) -> dict[str, object]:
    _, header, body = text.split("---\n", 2)
    assert "\n# " in body
    found: dict[str, object] = yaml.safe_load(header)
    return found


@pytest.mark.parametrize("template", get_args(Template))
def test_the_code_of_a_card_answers_as_the_engine_does(template: Template, tiny: BaseModel, tmp_path: Path) -> None:
    base = peft_base(tiny.name)
    card = make_card(base, template)
    layout: LoraLayout = find_targets(tiny.model, card.recipe.train)[0]
    adapter = OneAdapter(random_adapter(layout, 3))
    export_peft(layout, adapter.factors, tmp_path / "peft", base)
    write_card(tmp_path / "peft", base, card)
    question = 'Where is {Quorl} "7"?'
    processor = RequestProcessor(tiny, None, template=template)
    engine = Engine(tiny, card.recipe.train, processor, adapter)
    expected = engine.answer(Request(question, "prag", hits=(Hit(PASSAGE, 1.0),)))
    bare = engine.answer(Request(question, "closed"))
    engine.close()

    (code,) = CODE.findall((tmp_path / "peft" / "README.md").read_text())
    assert 'question = "What do you want to know?"' in code
    code = code.replace('"What do you want to know?"', repr(question))
    printed = io.StringIO()
    with contextlib.chdir(tmp_path / "peft"), contextlib.redirect_stdout(printed):
        exec(code, {})
    # A byte-level model may end within a character, which the engine leaves out.
    assert final_answer(printed.getvalue(), template).rstrip("\ufffd") == expected.text.rstrip("\ufffd")
    assert expected.text != bare.text


def test_the_header_names_the_base_model_the_library_and_a_licence_to_fill_in(tiny_model_folder: Path) -> None:
    base = replace(peft_base(str(tiny_model_folder)), name="acme/base: 1B", location="acme/base: 1B", revision="abc123")
    text = card_text(base, make_card(base, "brief"))
    header = header_of(text)
    assert (header["library_name"], header["base_model"], header["license"]) == ("peft", "acme/base: 1B", "unknown")
    assert "lora" in header["tags"]  # type: ignore[operator]
    for said in (base.facts.fingerprint, "revision `abc123`", "`p7`", PASSAGE.key, "40 steps", "3.2 s", "0.125"):
        assert said in text, said
    assert text.count('revision="abc123"') == 2
    assert PASSAGE.text not in text


def test_a_card_of_an_imported_adapter_states_no_training(tiny_model_folder: Path) -> None:
    base = peft_base(str(tiny_model_folder))
    text = card_text(base, replace(make_card(base, "brief"), title="a | b\n`c`", steps=0))
    assert "not trained here" in text
    assert "| loss |" not in text
    assert "| passage | a \\| b 'c', key" in text


def test_everyone_may_read_an_export(tiny: BaseModel, tmp_path: Path) -> None:
    base = peft_base(tiny.name)
    card = make_card(base, "brief")
    layout = find_targets(tiny.model, card.recipe.train)[0]
    export_peft(layout, random_adapter(layout, 1), tmp_path / "peft", base)
    write_card(tmp_path / "peft", base, card)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "peft").iterdir()}
    assert modes == dict.fromkeys(("adapter_config.json", "adapter_model.safetensors", "README.md"), "0o644")
