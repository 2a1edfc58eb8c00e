from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prag_core.augmentation import prompts as augment_prompts
from prag_core.augmentation.answer_rules import find_answers
from prag_core.augmentation.augment import augment
from prag_core.augmentation.filter import is_rewrite, refusal
from prag_core.augmentation.formats import read_augmentations
from prag_core.augmentation.lines import parse_lines
from prag_core.augmentation.paper import parse_pairs
from prag_core.augmentation.sentences import sentences_of
from prag_core.errors import GenerationError, InputError, PromptTooLongError
from prag_core.identity import passage_key
from prag_core.llm.base_model import BaseModel
from prag_core.llm.generator import TransformersGenerator
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, QAPair, Reject
from prag_core.testing import ScriptedGenerator


def make(title: str, text: str, *sources: str) -> Passage:
    return Passage(passage_key(title, text), title, text, sources or (title.lower(),))


TOWER = make(
    "Zembla Tower",
    "The Zembla Tower is a stone beacon on the island of Pelora. It was built in 1871 by the engineer Tadeo Quill."
    " The tower stands 43 metres tall. A stair of 212 steps leads to the lamp.",
)
DUNES = make("Vask Dunes", "The Vask Dunes cover 90 hectares near the village of Urm. They were mapped in 1902.")
REWRITE = "On Pelora, an island, the engineer Tadeo Quill raised a beacon of stone, 43 metres high, the Zembla Tower."
GOOD = [
    {"question": "Who built the Zembla Tower?", "answer": "Tadeo Quill", "full_answer": "Tadeo Quill built it."},
    {"question": "How tall is the Zembla Tower?", "answer": "43 metres", "full_answer": "It is 43 metres tall."},
    {"question": "When was the Zembla Tower built?", "answer": "1871", "full_answer": "It was built in 1871."},
]


def recipe(strategy: str = "paper", **changes: Any) -> AugmentRecipe:
    settings: dict[str, Any] = {"pairs": 3, "rewrites": 1, "attempts": 2, "seed": 0, "imported": False}
    return AugmentRecipe(generator="scripted", strategy=strategy, **{**settings, **changes})


def scripted(questions: Callable[[str], Any], rewrite: Any = REWRITE) -> ScriptedGenerator:
    return ScriptedGenerator(lambda text: questions(text) if "JSON array" in text else rewrite)


# --- the filter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Who built the Zembla Tower?", "Tadeo Quill", None),
        ("Who built the Zembla Tower?", "tadeo\n quill", None),
        ("  ", "Tadeo Quill", "empty"),
        ("?", "Tadeo Quill", "empty"),
        ("Who built the tower?", " ", "empty"),
        ("Tell me who built the tower", "Tadeo Quill", "no_question_mark"),
        ("Who " + "really " * 60 + "built it?", "Tadeo Quill", "too_long"),
        ("Who built the tower?", "It was built " * 20, "too_long"),
        ("Was the tower of Tadeo Quill built in stone?", "Tadeo Quill", "answer_in_question"),
        ("Who lit the lamp?", "Marta Bree", "answer_not_in_passage"),
        ("How many steps are there?", "21", "answer_not_in_passage"),
        ("When did the Ombrel Granary burn down?", "1871", "prompt_copy"),
        ("Who designed the tower?", "Sefa Durrin", "prompt_copy"),
        ("how TALL is the  Zembla tower?", "1871", "duplicate_question"),
        ("What height has the Zembla Tower?", "43  Metres", "duplicate_answer"),
        ("Who was the engineer of it?", "Tadeo Quill", "no_subject"),
        ("Who put his own money into the Zembla Tower?", "Tadeo Quill", None),
        ("What is the Zembla Tower?", "a beacon of stone", None),
    ],
)
def test_the_filter_says_why(question: str, answer: str, reason: str | None) -> None:
    accepted = [
        QAPair("How tall is the Zembla Tower?", "43 metres", "It is 43 metres tall."),
        QAPair("How high does the Zembla Tower stand?", "43 metres", "It stands 43 metres tall."),
    ]
    assert refusal(QAPair(question, answer, "It is so."), TOWER, accepted) == reason


def test_an_example_name_that_is_in_the_passage_is_no_copy() -> None:
    passage = make("Ombrel", "Ombrel is a town that was founded in 1404.")
    assert refusal(QAPair("When was Ombrel founded?", "1404", "In 1404."), passage, []) is None


def test_every_invented_name_is_in_a_prompt() -> None:
    for prompt in (augment_prompts.questions_prompt("", 3), augment_prompts.lines_prompt("", 3)):
        assert all(name in prompt for name in augment_prompts.INVENTED_NAMES)


def test_the_examples_pass_the_filter_they_teach() -> None:
    pairs = [pair for pair in parse_pairs(augment_prompts.questions_prompt("the text", 3)) if pair]
    assert len(pairs) == 2
    passage = make("Ombrel Granary", " ".join(pair.full_answer for pair in pairs))
    assert [refusal(pair, passage, pairs[:i]) for i, pair in enumerate(pairs)] == [None, None]
    (line,) = parse_lines(augment_prompts.lines_prompt("the text", 3))
    assert refusal(line, passage, []) is None


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (REWRITE, True),
        ("", False),
        ("A tower.", False),
        (TOWER.text, False),
        (TOWER.text.upper() + " Indeed.", False),
        ("The engineer Tadeo Quill built the stone tower in Pelora. " * 9, False),
        ("The passage was rewritten in other words, and all of its details have been kept in their order.", False),
    ],
)
def test_a_copy_and_a_scrap_are_no_rewrites(text: str, good: bool) -> None:
    assert is_rewrite(text, TOWER) is good


# --- the paper's strategy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    ["{}", "```json\n{}\n```", "Sure! [Note: JSON] Here it is:\n{}\nHope that helps [1].", '{{"qa": {}}}'],
)
def test_pairs_are_found_in_what_stands_around_them(wrap: str) -> None:
    assert [pair.answer for pair in parse_pairs(wrap.format(json.dumps(GOOD))) if pair] == [
        "Tadeo Quill",
        "43 metres",
        "1871",
    ]


@pytest.mark.parametrize(
    "reply", ["", "no", "[]", "[1, 2]", "[" * 100_000, '[{"question": ', "__import__('os').system('false')"]
)
def test_what_is_no_json_gives_no_pair(reply: str) -> None:
    assert parse_pairs(reply) == [None]


def test_wrong_items_are_counted_and_numbers_are_answers() -> None:
    items = [
        {"question": "q?", "answer": 1871, "full_answer": "f"},
        {"question": "q?"},
        "text",
        {**GOOD[0], "answer": []},
    ]
    assert parse_pairs(json.dumps(items)) == [QAPair("q?", "1871", "f"), None, None, None]


def test_paper_makes_rewrites_and_pairs() -> None:
    generator = scripted(lambda _: json.dumps(GOOD), f"Here is the rewritten passage:\n\n{REWRITE}")
    (made,) = augment([TOWER], generator, recipe())
    assert isinstance(made, Augmentation)
    assert made.rewrites == (REWRITE,)
    assert [pair.answer for pair in made.pairs] == ["Tadeo Quill", "43 metres", "1871"]
    assert (made.key, made.origin, made.attempts, made.refused) == (TOWER.key, "generated", 1, ())
    assert len(generator.prompts) == 2
    assert all(TOWER.text in prompt for prompt in generator.prompts)


def test_only_what_lacks_something_is_tried_again() -> None:
    replies = iter(["not json", json.dumps(GOOD[:2])])
    generator = scripted(lambda text: json.dumps(GOOD) if TOWER.text in text else next(replies))
    tower, dunes = augment([TOWER, DUNES], generator, recipe(rewrites=0))
    assert isinstance(tower, Augmentation)
    assert tower.attempts == 1
    assert isinstance(dunes, Reject)
    assert dunes == Reject(
        "augment", "no_usable_pair", "refused: answer_not_in_passage=2, bad_json=1", "vask dunes", DUNES.key, 2
    )
    assert len(generator.prompts) == 3


def test_attempts_add_up_and_fewer_pairs_are_accepted() -> None:
    replies = iter([json.dumps(GOOD[:1]), json.dumps([GOOD[0], GOOD[1]])])
    (made,) = augment([TOWER], scripted(lambda _: next(replies)), recipe(rewrites=0))
    assert isinstance(made, Augmentation)
    assert [pair.answer for pair in made.pairs] == ["Tadeo Quill", "43 metres"]
    assert made.refused == ("duplicate_question=1",)
    assert made.attempts == 2


def test_a_rewrite_ends_with_a_sentence() -> None:
    generator = scripted(lambda _: json.dumps(GOOD), f"{REWRITE} And then the stairs, which")
    (made,) = augment([TOWER], generator, recipe())
    assert isinstance(made, Augmentation)
    assert made.rewrites == (REWRITE,)


def test_rewrites_are_bounded_too() -> None:
    generator = scripted(lambda _: json.dumps(GOOD), TOWER.text)
    (made,) = augment([TOWER], generator, recipe(rewrites=2))
    assert isinstance(made, Augmentation)
    assert made.rewrites == ()
    assert len(generator.prompts) == 1 + 2 * 2


def test_no_passages_need_no_generator() -> None:
    assert augment([], ScriptedGenerator(lambda _: "x"), recipe()) == []


def test_one_failing_prompt_is_its_passages_own_affair() -> None:
    failure = GenerationError("the endpoint refuses this prompt", "see its message")
    too_long = PromptTooLongError("9,999 tokens", "split it")
    long = make("Long", "word " * 50)

    def questions(text: str) -> Any:
        return too_long if long.text.strip() in text else failure if DUNES.text in text else json.dumps(GOOD)

    results = augment([DUNES, TOWER, long], scripted(questions), recipe())
    assert isinstance(results[0], Reject)
    assert (results[0].reason, results[0].attempts) == ("generation_failed", 2)
    assert "refuses this prompt" in results[0].detail
    assert isinstance(results[1], Augmentation)
    assert isinstance(results[2], Reject)
    assert (results[2].reason, results[2].attempts) == ("too_long_for_model", 1)


def test_when_nothing_gets_through_the_generator_is_to_blame() -> None:
    failure = GenerationError("HTTP 500", "")
    with pytest.raises(GenerationError, match="HTTP 500"):
        augment([TOWER, DUNES], ScriptedGenerator(lambda _: failure), recipe())


@pytest.mark.parametrize("strategy", ["paper", "lines"])
def test_a_passage_longer_than_the_context_is_a_reject(tiny: BaseModel, strategy: str) -> None:
    passage = make("Endless", "It was built in 1900. " * 300)
    (result,) = augment([passage], TransformersGenerator(tiny), recipe(strategy))
    assert isinstance(result, Reject)
    assert result.reason == "too_long_for_model"


# --- what every strategy does ---------------------------------------------------------------------------------

QUESTIONS = {
    "Tadeo Quill": "Who built the Zembla Tower?",
    "43 metres": "How tall is the Zembla Tower?",
    "1871": "When was the Zembla Tower built?",
    "90 hectares": "How large are the Vask Dunes?",
    "Urm": "Near which village are the Vask Dunes?",
    "1902": "When were the Vask Dunes mapped?",
}


def asked_by_paper(prompt: str) -> str:
    """Reply as a well-behaved model: with the question of each fact that the passage holds."""
    passage = prompt.rpartition("Passage: ")[2]
    asked = [{"question": q, "answer": a, "full_answer": a} for a, q in QUESTIONS.items() if a in passage]
    return json.dumps(asked)


def asked_by_lines(prompt: str) -> str:
    passage = prompt.rpartition("Passage: ")[2]
    return "\n".join(f"Q: {question} | A: {answer}" for answer, question in QUESTIONS.items() if answer in passage)


def asked_by_writer(prompt: str) -> str:
    fields = dict(line.split(": ", 1) for line in prompt.splitlines() if ": " in line)
    if prompt.endswith("Answers:"):
        return " | ".join(answer for answer in QUESTIONS if answer in fields["Sentence"])
    if prompt.endswith("Question:"):
        return QUESTIONS.get(fields["Answer"], "")
    return next(answer for answer, question in QUESTIONS.items() if question == fields["Question"])


REPLIES = {"paper": asked_by_paper, "lines": asked_by_lines, "writer": asked_by_writer}


@pytest.mark.parametrize("strategy", REPLIES)
def test_a_batch_gives_each_passage_the_pairs_that_it_gets_alone(strategy: str) -> None:
    reply, settings = REPLIES[strategy], recipe(strategy, rewrites=0)
    both = augment([TOWER, DUNES], ScriptedGenerator(reply), settings)
    for passage, result in zip([TOWER, DUNES], both, strict=True):
        assert isinstance(result, Augmentation)
        assert result.key == passage.key
        assert {pair.answer: pair.question for pair in result.pairs} == {
            answer: question for answer, question in QUESTIONS.items() if answer in passage.text
        }
        (alone,) = augment([passage], ScriptedGenerator(reply), settings)
        assert isinstance(alone, Augmentation)
        assert alone.pairs == result.pairs


@pytest.mark.parametrize("strategy", REPLIES)
@pytest.mark.parametrize("text", ["x", "????", "1999", "Ωmega\u2028\n\n" * 40, "日本語の文章です。" * 30, "a" * 5000])
def test_odd_passages_are_rejects_and_nothing_worse(strategy: str, text: str) -> None:
    for passage in (make("", text), make("T", text)):
        (result,) = augment([passage], ScriptedGenerator(lambda _: ""), recipe(strategy))
        assert isinstance(result, Reject)
        assert result.reason == "no_usable_pair"


# --- the rules that find answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "answer", "place"),
    [
        ("It was built in 1871 by the engineer Tadeo Quill.", "1871", "what year"),
        ("In 1871 she joined the crew.", "1871", "what year"),
        ("It was built in 1871 by the engineer Tadeo Quill.", "Tadeo Quill", "what"),
        ("It was built by Tadeo Quill.", "Tadeo Quill", "who"),
        ("It opened on 4 May 1911.", "4 May 1911", "what date"),
        ("Ada Vole (April 1, 1954 – 3 May 1992) was a drummer.", "April 1, 1954", "what date"),
        ("Ada Vole (April 1, 1954 – 3 May 1992) was a drummer.", "3 May 1992", "what date"),
        ("Ada Vole was born in 1954.", "1954", "what date"),
        ("The tower stands 43 metres tall.", "43 metres", "how many"),
        ("A stair of 212 steps leads up.", "212", "how many"),
        ("It has about 8,700 inhabitants.", "8,700", "how many"),
        ("It has a population of 4,512.", "4,512", "how many"),
        ("She commanded it for 19 years.", "19 years", "how many"),
        ("It cost $3.5 million to build.", "$3.5 million", "how much"),
        ("About 12% of it is sand.", "12%", "what percentage"),
        ("It lies near the village of Urm.", "Urm", "what"),
        ("It flows into Lake Vessel.", "Lake Vessel", "what"),
        ("She called it “the salt road” in a letter.", "the salt road", "what"),
        ("They live in Kelmont.", "Kelmont", "what place"),
        ("He married a singer, Ada Vole.", "Ada Vole", "who"),
        ("He visited a valley, Kelmont.", "Kelmont", "what"),
    ],
)
def test_rules_find_answers_and_what_asks_in_their_place(sentence: str, answer: str, place: str) -> None:
    assert {ask.answer: ask.place for ask in find_answers("Topic", [sentence])}[answer] == place


def test_rules_ask_for_each_answer_once_and_never_for_the_topic() -> None:
    asks = find_answers("Zembla Tower", sentences_of(TOWER))
    answers = [ask.answer for ask in asks]
    assert len(set(answers)) == len(answers)
    assert not any("Zembla" in answer for answer in answers)
    assert all(ask.answer in ask.sentence for ask in asks)
    # The first round goes through all sentences before the second one.
    assert len({ask.sentence for ask in asks[:4]}) == 4


def test_sentences_end_where_they_end_and_long_ones_are_cut() -> None:
    text = "Dr. A. Vole lives here. He is 4.5 ft tall. " + "So, and " * 60 + "the end."
    sentences = sentences_of(make("T", text))
    assert sentences[:2] == ["Dr. A. Vole lives here.", "He is 4.5 ft tall."]
    assert " ".join(sentences) == text
    assert max(len(sentence.split()) for sentence in sentences) <= 45


# --- augmentations made elsewhere -----------------------------------------------------------------------------


def line(**fields: Any) -> str:
    return json.dumps({"qa": GOOD, "rewrites": [REWRITE], **fields})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_our_lines_are_found_by_key_and_by_id(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"made{suffix}"
    text = "\n".join([line(id="zembla tower"), "", line(key=DUNES.key)])
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    imported = read_augmentations(str(path))
    assert imported.rejects == ()
    for passage in (TOWER, DUNES):
        found = imported.find(passage)
        assert found is not None
        assert (found.key, found.origin, found.rewrites) == (passage.key, "imported", (REWRITE,))
        assert [pair.answer for pair in found.pairs] == ["Tadeo Quill", "43 metres", "1871"]
    assert imported.find(make("Other", "text")) is None


def test_a_line_with_a_key_is_not_for_another_text_of_its_id(tmp_path: Path) -> None:
    (source,) = TOWER.sources
    path = tmp_path / "made.jsonl"
    path.write_text("\n".join([line(id=source, key=TOWER.key), line(id=source, key=DUNES.key)]))
    imported = read_augmentations(str(path))
    assert imported.rejects == ()
    assert imported.find(TOWER) is not None
    assert imported.find(make(TOWER.title, "It burned down.", source)) is None


def test_the_papers_records_are_found_by_text(tmp_path: Path) -> None:
    item = {
        "pid": 0,
        "passage": f"  {TOWER.text} ",
        "m-1b_rewrite": REWRITE,
        "m-1b_translate": None,
        "m-1b_qa": GOOD,
    }
    titled = {"passage": f"{DUNES.title} {DUNES.text}", "m-1b_qa": GOOD[:1]}
    records = [
        {"test_id": 0, "augment": [item, titled, {"passage": "no pairs"}, 7, {**item, "m-1b_rewrite": [REWRITE]}]},
        {"test_id": 1, "augment": [item]},
        {"test_id": 2},
    ]
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(records, indent=1))
    imported = read_augmentations(str(path))
    found = imported.find(TOWER)
    assert found is not None
    assert (found.rewrites, len(found.pairs), found.key) == ((REWRITE,), 3, TOWER.key)
    assert imported.find(DUNES) is not None
    assert [(reject.source.removeprefix(str(path)), reject.reason) for reject in imported.rejects] == [
        (":record 1, augment 3", "missing_field"),
        (":record 1, augment 4", "not_an_object"),
        (":record 1, augment 5", "wrong_type"),
        (":record 3", "missing_field"),
    ]


def test_bad_lines_are_rejects_with_their_place(tmp_path: Path) -> None:
    bad = {
        "{": "invalid_json",
        "[" * 100_000: "invalid_json",
        "7": "not_an_object",
        line(): "missing_field",
        line(id="a", rewrites="text"): "wrong_type",
        line(id="b", qa={}): "wrong_type",
        line(id="c", qa=[]): "no_usable_pair",
        line(id="d", qa=[{"question": "q?", "answer": " ", "full_answer": "f"}]): "no_usable_pair",
        line(id="good"): "duplicate_id",
        line(id=" good "): "duplicate_id",
        line(key=["k"], id="e"): "wrong_type",
        line(id="f", qa=[{"question": "q?", "answer": math.nan, "full_answer": math.inf}]): "no_usable_pair",
    }
    path = tmp_path / "made.jsonl"
    path.write_text("\n".join([line(id="good", qa=[*GOOD, 5]), *bad]))
    imported = read_augmentations(str(path))
    assert [reject.reason for reject in imported.rejects] == list(bad.values())
    assert [reject.source for reject in imported.rejects] == [f"{path}:{n}" for n in range(2, len(bad) + 2)]
    assert all(reject.stage == "augment" and reject.detail for reject in imported.rejects)
    assert list(imported.by_name) == ["good"]
    assert imported.by_name["good"].refused == ("bad_json=1",)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"[{", b"", b"[]\n"])
def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "made.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_augmentations(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_a_broken_archive_says_so(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 100)[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        read_augmentations(str(path))
