"""Cloze questions: what they ask, and which facts they leave to other pairs."""

from __future__ import annotations

from dataclasses import asdict, replace

from prag_core.augmentation.augment import complete
from prag_core.augmentation.cloze import add_cloze_pairs
from prag_core.augmentation.coverage import coverage
from prag_core.augmentation.filter import Draft
from prag_core.identity import fingerprint
from prag_core.recipe import RECIPES, AugmentRecipe, Recipe
from prag_core.records import Augmentation, Passage, QAPair

PASSAGE = Passage(
    "k",
    "Cazambra Lighthouse",
    "The Cazambra Lighthouse (also Old Caz) is a stone beacon on the cape of Punta Orrel. It was built in 1871 by the "
    "engineer Tadeo Quillasco. A spiral stair of 212 steps leads to the lantern room.",
    ("a",),
)
RECIPE = AugmentRecipe("none", "lines", pairs=0, rewrites=0, attempts=1, seed=0, imported=True, cloze=True)


def made(*pairs: QAPair, wanted: int = 8, passage: Passage = PASSAGE) -> dict[str, str]:
    draft = Draft(passage, wanted, pairs=list(pairs))
    add_cloze_pairs(draft)
    return {pair.answer: pair.question for pair in draft.pairs}


def test_each_fact_is_asked_for_in_its_sentence_and_names_the_subject() -> None:
    asked = made()
    assert asked["stone beacon"] == "What is Cazambra Lighthouse?"
    assert asked["1871"] == ("Cazambra Lighthouse: It was built in what year by the engineer Tadeo Quillasco?")
    assert asked["Tadeo Quillasco"].startswith("Cazambra Lighthouse: It was built in 1871 by the engineer what")
    assert asked["212"] == "Cazambra Lighthouse: A spiral stair of how many steps leads to the lantern room?"
    assert coverage(PASSAGE, [QAPair(question, answer, answer) for answer, question in asked.items()]) == 1.0


def test_a_fact_that_a_pair_asks_about_is_left_to_it() -> None:
    own = QAPair("When was it finished?", "in 1871", "It was finished in 1871.")
    asked = made(own)
    assert asked["in 1871"] == own.question
    assert "1871" not in asked
    assert list(made(own, wanted=1)) == ["in 1871"]


def test_the_subject_is_only_what_the_first_sentence_says_of_it() -> None:
    other = replace(PASSAGE, text="In 1871 there was a storm over Velmara. Nobody saw it.")
    assert "storm" not in made(passage=other)
    assert made(passage=replace(PASSAGE, text="", title="")) == {}


def test_a_fact_is_asked_for_where_it_stands_as_a_word_of_its_own() -> None:
    text = (
        "The network of Dorn has grown and its members built two towers. "
        "In 1915 the guild opened a hall with 15 looms. Marta of Holl founded the school of art."
    )
    other = replace(PASSAGE, title="Dorn", text=text)
    asked = made(passage=other, wanted=24)
    assert asked["two"] == "The network of Dorn has grown and its members built how many towers?"
    assert asked["15"] == "Dorn: In 1915 the guild opened a hall with how many looms?"
    # A writer may name a fact in other letters.
    draft = Draft(other, 24, unasked=[("Art", "Marta of Holl founded the school of art."), ("rk", text)])
    add_cloze_pairs(draft)
    (pair,) = [pair for pair in draft.pairs if pair.answer == "art"]
    assert pair.question == "Dorn: Marta of Holl founded the school of what?"
    assert not [pair for pair in draft.pairs if pair.answer == "rk"]


def test_an_imported_augmentation_is_filled_up() -> None:
    own = QAPair("Who built the lighthouse?", "Tadeo Quillasco", "Tadeo Quillasco built it.")
    imported = Augmentation("k", (), (own,), "imported", (), 0)
    full = complete(PASSAGE, imported, RECIPE)
    assert full.pairs[0] == own
    assert len(full.pairs) > 3
    assert full.coverage == 1.0
    plain = complete(PASSAGE, imported, replace(RECIPE, cloze=False))
    assert plain.pairs == (own,)
    assert plain.coverage < 1
    assert len(complete(PASSAGE, imported, replace(RECIPE, pairs=2)).pairs) == 2


def test_a_recipe_without_cloze_keeps_the_name_that_it_had_before() -> None:
    old = replace(RECIPE, cloze=False)
    content = asdict(old)
    del content["cloze"], content["complete_imports"]
    assert old.fingerprint == fingerprint(content)
    assert old.fingerprint != RECIPE.fingerprint
    # A stored recipe may lack the field.
    document = {**Recipe("base", old, RECIPES["recall"]).to_json(), "augment": content}
    assert Recipe.from_json(document) == Recipe("base", old, RECIPES["recall"])
