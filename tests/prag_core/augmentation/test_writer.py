"""The strategy `writer`: what it learns, and which of its questions are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prag_core.augmentation.augment import augment, expected_pairs, lacks_pairs
from prag_core.augmentation.coverage import coverage
from prag_core.augmentation.filter import is_same_fact
from prag_core.augmentation.writer import writer_tasks
from prag_core.errors import GenerationError
from prag_core.identity import passage_key
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, QAPair, Reject
from prag_core.testing import ScriptedGenerator

TEXT = "The Zembla Tower is a stone beacon on Pelora. It was built in 1871 by Tadeo Quill. It is 43 metres tall."
TOWER = Passage(passage_key("Zembla Tower", TEXT), "Zembla Tower", TEXT, ("tower",))
BUILT = "It was built in 1871 by Tadeo Quill."
RECIPE = AugmentRecipe("scripted", "writer", pairs=8, rewrites=0, attempts=1, seed=0, imported=False)


def reply(prompt: str) -> str:
    """A writer that knows the second sentence only."""
    if BUILT not in prompt:
        return ""
    if prompt.endswith("Answers:"):
        return " 1871 | Tadeo Quill | the moon"
    if prompt.endswith("Question:"):
        return " When was Zembla Tower built?" if "Answer: 1871" in prompt else " Who built Zembla Tower?"
    return " in 1871" if "When" in prompt else " somebody else"


def test_a_question_is_kept_if_it_is_answered_alike() -> None:
    (made,) = augment([TOWER], ScriptedGenerator(reply), RECIPE)
    assert isinstance(made, Augmentation)
    assert [(pair.question, pair.answer) for pair in made.pairs] == [("When was Zembla Tower built?", "1871")]
    assert made.pairs[0].full_answer == BUILT
    assert made.refused == ("answered_otherwise=1",)


def test_a_fact_without_a_good_question_is_left_to_a_cloze_question() -> None:
    """The writer names a fact that no rule finds, and answers its own question with another one."""
    lamp = "Its lamp burned whale oil for years."
    tower = replace(TOWER, text=f"{TEXT} {lamp}")

    def named(prompt: str) -> str:
        if lamp not in prompt:
            return ""
        if prompt.endswith("Answers:"):
            return " whale oil | Whale Oil"
        return " What is it?" if prompt.endswith("Question:") else " a tower"

    recipe = replace(RECIPE, cloze=True, pairs=24)
    (plain,) = augment([tower], ScriptedGenerator(lambda _: ""), recipe)
    (made,) = augment([tower], ScriptedGenerator(named), recipe)
    assert isinstance(plain, Augmentation)
    assert isinstance(made, Augmentation)
    (more,) = [pair for pair in made.pairs if pair not in plain.pairs]
    # There is room for it even where a passage of this length has fewer pairs.
    (roomy,) = augment([tower], ScriptedGenerator(named), replace(recipe, pairs=0))
    assert isinstance(roomy, Augmentation)
    assert roomy.pairs == made.pairs
    assert (more.question, more.answer) == ("Zembla Tower: Its lamp burned what for years?", "whale oil")


@pytest.mark.parametrize(
    ("fact", "answer", "kept"),
    [
        ("12 steps", "15 steps", False),
        ("12 steps", "12 steps", True),
        ("3 June", "7 June", False),
        ("3 June 1901", "June 1901", True),
    ],
)
def test_an_answer_with_another_number_is_another_answer(fact: str, answer: str, kept: bool) -> None:
    text = f"The stair of the Zembla Tower has {fact} in all."
    tower = Passage(passage_key("Zembla Tower", text), "Zembla Tower", text, ("tower",))

    def said(prompt: str) -> str:
        if prompt.endswith("Answers:"):
            return fact
        return answer if prompt.endswith("Answer:") else "What has the stair of the Zembla Tower?"

    (made,) = augment([tower], ScriptedGenerator(said), RECIPE)
    assert isinstance(made, Augmentation if kept else Reject)


@pytest.mark.parametrize("asked", [10, 1], ids=["more than it has room for", "most without a question"])
def test_each_fact_that_was_named_gets_a_cloze_question_at_least(asked: int) -> None:
    facts = ["red", "green", "blue", "black", "white", "brown", "orange", "purple", "yellow", "grey"]
    text = f"Its rooms are {', '.join(facts)}."
    tower = Passage(passage_key("Zembla Tower", text), "Zembla Tower", text, ("tower",))

    def said(prompt: str) -> str:
        if prompt.endswith("Answers:"):
            return " | ".join(facts)
        last = prompt.splitlines()[-2]
        if prompt.endswith("Question:"):
            number = facts.index(last.removeprefix("Answer: "))
            return f"What is room {number} of the Zembla Tower?" if number < asked else ""
        return facts[int(last.split()[4])]

    recipe = replace(RECIPE, pairs=0, cloze=True)
    (made,) = augment([tower], ScriptedGenerator(said), recipe)
    assert isinstance(made, Augmentation)
    assert {pair.answer for pair in made.pairs} >= set(facts)
    assert sum(pair.question.startswith("What is room") for pair in made.pairs) == min(asked, 8)


@pytest.mark.parametrize(("words", "plain", "written"), [(30, 8, 11), (105, 15, 18), (400, 24, 24)])
def test_a_plan_expects_more_pairs_where_a_writer_names_the_facts(words: int, plain: int, written: int) -> None:
    passage = replace(TOWER, text="word " * words)
    recipe = replace(RECIPE, pairs=0, cloze=True)
    assert expected_pairs(passage, recipe) == written
    for other in (replace(recipe, strategy="lines"), replace(recipe, cloze=False)):
        assert expected_pairs(passage, other) == plain
    assert expected_pairs(passage, replace(recipe, pairs=5)) == 5


def test_nothing_is_kept_of_a_writer_that_answers_nothing() -> None:
    (made,) = augment([TOWER], ScriptedGenerator(lambda _: ""), RECIPE)
    assert isinstance(made, Reject)
    assert made.reason == "no_usable_pair"


def test_a_writer_that_fails_is_no_writer_of_nothing() -> None:
    text = "They were mapped in 1902."
    dunes = Passage(passage_key("Vask Dunes", text), "Vask Dunes", text, ("dunes",))
    failing = ScriptedGenerator(lambda _: GenerationError("its output is not finite", "load it as float32"))
    with pytest.raises(GenerationError, match="not finite"):
        augment([TOWER, dunes], failing, replace(RECIPE, cloze=True))
    # Rules must not make up for it, or a run would store their pairs as the model's.
    (made,) = augment([TOWER], failing, replace(RECIPE, cloze=True))
    assert isinstance(made, Reject)
    assert made.reason == "generation_failed"


def test_an_import_gets_pairs_on_what_it_leaves_out() -> None:
    own = QAPair("How tall is Zembla Tower?", "43 metres", "It is 43 metres tall.")
    given = Augmentation(TOWER.key, ("a rewrite",), (own,), "imported", refused=("bad_json=2",), attempts=0)
    recipe = replace(RECIPE, complete_imports=True, imported=True, rewrites=1, attempts=3)
    assert lacks_pairs(given, recipe)
    assert not lacks_pairs(given, replace(recipe, pairs=1))
    assert not lacks_pairs(given, replace(recipe, complete_imports=False))
    generator = ScriptedGenerator(reply)
    (made,) = augment([TOWER], generator, recipe, {TOWER.key: given})
    assert isinstance(made, Augmentation)
    assert [pair.answer for pair in made.pairs] == ["43 metres", "1871"]
    assert (made.origin, made.rewrites, made.attempts) == ("imported", ("a rewrite",), 1)
    # What was refused of the import stays counted, beside what is refused of the writer.
    assert made.refused == ("answered_otherwise=1", "bad_json=2")
    assert made.coverage > coverage(TOWER, [own])
    # A fact that an imported pair asks about is not asked about again.
    built = QAPair("Which year saw the Zembla Tower built?", "in 1871", BUILT)
    (made,) = augment([TOWER], ScriptedGenerator(reply), recipe, {TOWER.key: replace(given, pairs=(built,))})
    assert isinstance(made, Augmentation)
    assert made.pairs == (built,)


def test_an_import_is_never_a_reject_but_a_generator_that_is_down_is_told() -> None:
    own = QAPair("How tall is Zembla Tower?", "43 metres", "It is 43 metres tall.")
    texts = [TEXT, *(f"{TEXT} It has {n} steps." for n in range(2, 5))]
    passages = [replace(TOWER, key=passage_key("Zembla Tower", text), text=text) for text in texts]
    given = {passage.key: Augmentation(passage.key, (), (own,), "imported", attempts=0) for passage in passages}
    down = ScriptedGenerator(lambda _: GenerationError("HTTP 500", "see what the server logs"))
    with pytest.raises(GenerationError, match="HTTP 500"):
        augment(passages, down, RECIPE, given)
    (made,) = augment(passages[:1], down, replace(RECIPE, cloze=True), given)
    assert isinstance(made, Augmentation)
    assert made.pairs[0] == own
    assert "no_reply=1" in made.refused


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a poet", "Poet", True),
        ("librarian and writer", "American librarian and writer", True),
        ("May 6, 1910", "6 May 1910", True),
        ("London", "8 September 1788 in London", False),
        ("1871", "1872", False),
        ("3 June 1901", "17 June 1901", False),
        ("King Olaf II of Dorn", "King Olaf III of Dorn", False),
        ("John Smith Holl", "Mary Smith Holl", False),
        ("the great hall of the old guild", "the great hall of the guild", True),
        ("the", "The", True),
        ("€", "$", False),
    ],
)
def test_answers_with_the_same_words_are_one_fact(one: str, other: str, same: bool) -> None:
    assert is_same_fact(one, other) == is_same_fact(other, one) == same


def test_a_pair_is_learned_from_the_sentence_that_holds_its_answer() -> None:
    pairs = [("Who built it?", "Tadeo Quill"), ("In what year was it built?", "1871"), ("What colour?", "red")]
    tasks = list(writer_tasks(TOWER, pairs))
    begin = f"Topic: Zembla Tower\nSentence: {BUILT}\n"
    assert tasks == [
        (f"{begin}Answer: Tadeo Quill\nQuestion:", "Who built it?"),
        (f"{begin}Question: Who built it?\nAnswer:", "Tadeo Quill"),
        (f"{begin}Answer: 1871\nQuestion:", "In what year was it built?"),
        (f"{begin}Question: In what year was it built?\nAnswer:", "1871"),
        (f"{begin}Answers:", "1871 | Tadeo Quill"),
    ]
