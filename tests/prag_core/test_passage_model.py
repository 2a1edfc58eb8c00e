"""A model that learns single passages does what the pipeline does with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipelines.execution.outcomes import TASK
from pipelines.settings import make_context
from pipelines.stages.train import TrainAdapters
from prag_core.config_file import parse_config
from prag_core.errors import AdapterError, ConfigError, InputError
from prag_core.passage_model import PassageModel
from prag_core.recipe import RECIPES
from prag_core.records import Augmentation, Passage, QAPair, to_table
from prag_core.store.adapters import AdapterStore, LedgerSource
from prag_core.testing import ScriptedGenerator
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.training import outcomes_here

TITLE, TEXT = "Orven Bridge", "The Orven Bridge was designed by Maren Tilsk. It opened in 1931 and is 310 metres long."
PAIRS = [("Who designed the Orven Bridge?", "Maren Tilsk")]


@pytest.fixture
def model(tiny_model_folder: Path) -> PassageModel:
    return PassageModel(str(tiny_model_folder), dtype="float32", device="cpu")


def test_it_trains_the_adapter_that_the_pipeline_trains(
    model: PassageModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    passage = replace(model.learn(TEXT, PAIRS, title=TITLE), sources=("p1",))
    learned = model.learned[passage.key]
    config = parse_config(
        {
            "store": str(tmp_path / "store"),
            "corpus": {"path": "corpus.jsonl"},
            "model": {"name": str(tiny_model_folder), "dtype": "float32", "device": "cpu"},
            "augment": {"import_file": "augmentations.jsonl", "complete_imports": False},
            "storage": {"adapter_dtype": "float32"},
        }
    )
    context = make_context(config, "run")
    assert learned.recipe == context.recipe
    assert learned.augmentation is not None
    # The given pair, and cloze questions for what it leaves out.
    assert [(pair.question, pair.answer) for pair in learned.augmentation.pairs[:1]] == PAIRS
    assert "1931" in {pair.answer for pair in learned.augmentation.pairs}
    table = to_table(Passage, [passage])
    for name in ("rewrites", "pairs", "origin"):
        table = table.append_column(name, to_table(Augmentation, [learned.augmentation])[name])
    table = table.append_column("augmentation", pa.array([learned.augmentation.digest]))
    list(outcomes_here(TrainAdapters(context), table.append_column(TASK, pa.array(["task"]))))
    adapters = AdapterStore(context.store, context.recipe, context.layout)
    trained = LedgerSource(adapters, adapters.ledger_parts()).get(passage.key)
    assert learned.adapter.factors is not None
    for name, factor in trained.items():
        torch.testing.assert_close(learned.adapter.factors[name], factor)


def test_an_answer_says_how_passages_were_used(model: PassageModel) -> None:
    passage = model.learn(TEXT, PAIRS, title=TITLE)
    question = "Who planned the Orven Bridge?"
    closed, prag, combine = (model.ask(question, mode=mode) for mode in ("closed", "prag", "combine"))
    assert closed.passages == ()
    assert prag.text != closed.text
    (used,) = prag.passages
    assert (used.key, used.in_weights, used.in_prompt, used.weight) == (passage.key, True, False, 1.0)
    (used,) = combine.passages
    assert (used.in_weights, used.in_prompt, used.weight) == (True, True, 0.5)
    # One that was not learned goes into the prompt, as in the pipeline where an adapter is missing.
    learned, other = model.ask(question, [passage, "The Orven is a river."], "prag").passages
    assert (learned.in_weights, other.in_weights, other.in_prompt) == (True, False, True)
    assert "not learned" in other.note
    assert len(model.ask(question, passage, max_new_tokens=3).text) < 10


def test_an_adapter_is_saved_and_loaded_as_a_peft_folder(
    model: PassageModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model.learn(TEXT, PAIRS, title=TITLE)
    model.save(tmp_path / "adapter")
    assert "opened in 1931" not in (tmp_path / "adapter" / "README.md").read_text()
    other = PassageModel(str(tiny_model_folder), dtype="float32", device="cpu")
    other.load(tmp_path / "adapter", TEXT, title=TITLE)
    question = "Who planned the Orven Bridge?"
    assert other.ask(question, mode="prag").text == model.ask(question, mode="prag").text
    other.save(tmp_path / "again")
    assert "not trained here" in (tmp_path / "again" / "README.md").read_text()


def test_a_generator_of_ones_own_writes_the_pairs(tiny_model_folder: Path) -> None:
    generator = ScriptedGenerator(lambda prompt: "Q: Who designed the Orven Bridge? | A: Maren Tilsk")
    model = PassageModel(str(tiny_model_folder), dtype="float32", device="cpu", generator=generator)
    learned = model.learned[model.learn(TEXT, title=TITLE).key]
    assert learned.augmentation is not None
    assert learned.augmentation.pairs[0] == QAPair(*PAIRS[0], learned.augmentation.pairs[0].full_answer)
    assert (learned.recipe.augment.strategy, learned.recipe.augment.generator) == ("lines", "scripted")


def test_a_recipe_is_a_name_or_ones_own(tiny_model_folder: Path) -> None:
    recipe = replace(RECIPES["recall"], epochs=1, rank=4)
    model = PassageModel(str(tiny_model_folder), dtype="float32", device="cpu", recipe=recipe)
    passage = make_passage(1)
    model.learn(passage, make_augmentation(passage).pairs)
    learned = model.learned[passage.key]
    assert learned.augmentation is not None
    assert learned.adapter.steps == len(learned.augmentation.pairs)
    with pytest.raises(ConfigError, match="no such recipe"):
        PassageModel(str(tiny_model_folder), recipe="small")
    with pytest.raises(ConfigError, match="no store"):
        PassageModel(str(tiny_model_folder), recipe=replace(recipe, start="0" * 32))


def test_what_cannot_be_learned_or_asked_is_named(model: PassageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 passages were learned: none"):
        model.ask("Who?")
    assert model.ask("Who?", mode="closed").mode == "closed"
    with pytest.raises(InputError, match="blank"):
        model.learn(" \n")
    with pytest.raises(InputError, match="pair 2: the question or the answer is blank"):
        model.learn(TEXT, [*PAIRS, ("Who?", " ")])
    with pytest.raises(InputError, match="empty"):
        model.learn(TEXT, [])
    with pytest.raises(InputError, match="was not learned"):
        model.save(tmp_path / "adapter", TEXT)
    for number in (1, 2):
        model.learn(make_passage(number), PAIRS)
    with pytest.raises(InputError, match="2 passages were learned: passage 'Quorl 1', passage 'Quorl 2'"):
        model.ask("Who?")
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        model.load(tmp_path, TEXT)
