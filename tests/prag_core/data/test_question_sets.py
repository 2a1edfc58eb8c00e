"""The published forms of question sets, in tiny invented files; malformed ones name the record and the field."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prag_core.augmentation.formats import read_augmentations
from prag_core.data import question_sets
from prag_core.data.gold import GoldIndex, match_gold
from prag_core.data.question_sets import read_questions
from prag_core.data.questions import Gold, Question
from prag_core.errors import InputError
from prag_core.identity import passage_key
from prag_core.records import Passage
from tests.helpers.http_files import serve_folder
from tests.helpers.passages import make_passage

HOTPOT = {
    "_id": "h1",
    "answer": "Vend",
    "question": "In which land lies the hill that Mira Oss climbed?",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Mira Oss", 0], ["Quorl", 1], ["Mira Oss", 1]],
    "context": [
        ["Quorl", ["Quorl is a hill.", " It lies in Vend."]],
        ["Other", ["Something else."]],
        ["Mira Oss", ["Mira Oss climbed Quorl.", " She was twelve."]],
    ],
}
TWO_WIKI = {
    **HOTPOT,
    "_id": "w1",
    "type": "bridge_comparison",
    "evidences": [["Quorl", "country", "Vend"]],
    "answer_id": "Q1",
}
SQUAD_QA = {
    "id": "s1",
    "question": "What is Quorl?",
    "answers": [{"text": "a hill", "answer_start": 9}, {"text": "hill", "answer_start": 11}],
}
SQUAD = {
    "version": "1.1",
    "data": [{"title": "Quorl_(hill)", "paragraphs": [{"context": "Quorl is a hill.", "qas": [SQUAD_QA]}]}],
}
POPQA = (
    "id\tsubj\tprop\tobj\to_aliases\ts_wiki_title\tquestion\tpossible_answers\n"
    '7\tMira Oss\toccupation\tclimber\t"[""alpinist""]"\tMira Oss\tWhat is Mira Oss\'s occupation?\t'
    '"[""climber"", ""alpinist""]"\n'
)
CWQ = {
    "ID": "c1",
    "question": "Who climbed the hill of Vend?",
    "compositionality_type": "composition",
    "answers": [{"answer": "Mira Oss", "aliases": ["M. Oss"], "answer_id": "m.0"}],
}
CWQ_FLAT = {"test_id": 0, "question": "Who climbed the hill of Vend?", "answer": ["Mira Oss", "M. Oss"]}
LINE = {"id": "q1", "question": "What is Quorl?", "answers": ["a hill"], "passage_id": "p1", "covered": True}


def write(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def test_hotpotqa(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, "hotpot.json.gz", [HOTPOT]))
    assert (question.id, question.answers, question.type) == ("h1", ("Vend",), "bridge")
    assert [(g.title, " ".join(g.text.split())) for g in question.gold] == [
        ("Mira Oss", "Mira Oss climbed Quorl. She was twelve."),
        ("Quorl", "Quorl is a hill. It lies in Vend."),
    ]


def test_hotpotqa_fullwiki_whose_contexts_were_retrieved(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, "fullwiki.json", [{**HOTPOT, "context": HOTPOT["context"][:2]}]))
    assert [(g.title, bool(g.text)) for g in question.gold] == [("Mira Oss", False), ("Quorl", True)]
    # What its title alone names is found by its title.
    whole = passage("Mira Oss", "Mira Oss climbed Quorl.", "w1")
    assert GoldIndex([question]).is_gold(whole)
    assert match_gold([question], [whole]) == {"h1": (whole,)}


def test_gold_is_found_however_its_letters_are_composed(tmp_path: Path) -> None:
    context = [["Mira Os\u0301", ["Mira Os\u0301 climbed Quorl."]]]
    entry = {**HOTPOT, "context": context, "supporting_facts": [["Mira Os\u0301", 0]]}
    (question,) = read_questions(write(tmp_path, "hotpot.json", [entry]))
    whole = passage("Mira O\u015b", "Mira O\u015b climbed Quorl.", "w1")
    assert GoldIndex([question]).is_gold(whole)
    assert match_gold([question], [whole]) == {"h1": (whole,)}


def test_two_wiki_with_its_aliases(tmp_path: Path) -> None:
    kinds = ("compositional", "comparison", "bridge_comparison", "inference")
    path = write(tmp_path, "dev.json", [{**TWO_WIKI, "_id": kind, "type": kind} for kind in kinds])
    assert {q.answers for q in read_questions(path)} == {("Vend",)}
    lines = [{"Q_id": "Q1", "aliases": ["Vendland", "Vend"]}, {"Q_id": "Q2", "aliases": []}]
    write(tmp_path, "id_aliases.json", "\n".join(map(json.dumps, lines)) + "\n")
    questions = read_questions(path)
    assert {q.answers for q in questions} == {("Vend", "Vendland")}
    assert tuple(q.type for q in questions) == kinds
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in ("dev.json", "id_aliases.json"):
            archive.write(tmp_path / file, file)
    with serve_folder(tmp_path) as url:
        for address in (f"{url}/dev.json?signature=a/b", f"zip://dev.json::{tmp_path}/set.zip"):
            assert read_questions(address)[0].answers == ("Vend", "Vendland")


def test_aliases_that_may_not_be_read_are_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_sets, "_ALIASES", "forbidden.json")
    write(tmp_path, "dev.json", [TWO_WIKI])
    with serve_folder(tmp_path) as url, pytest.raises(InputError, match=r"forbidden\.json: cannot be read") as caught:
        read_questions(f"{url}/dev.json?signature=secret")
    assert "belongs to the set" in caught.value.remedy


def test_no_message_has_the_signature_of_a_url(tmp_path: Path) -> None:
    write(tmp_path, "bad.jsonl", "{}")
    write(tmp_path, "bad.json", "[1")
    with serve_folder(tmp_path) as url:
        for name in ("bad.jsonl", "bad.json"):
            with pytest.raises(InputError, match=name) as caught:
                read_questions(f"{url}/{name}?signature=secret")
            assert "secret" not in str(caught.value)
        with pytest.raises(InputError, match=r"bad\.json") as caught:
            read_augmentations(f"{url}/bad.json?signature=secret")
        assert "secret" not in str(caught.value)


def test_squad(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, "train.json", SQUAD))
    assert question == Question(
        "s1", "What is Quorl?", ("a hill", "hill"), "extractive", (Gold(title="Quorl (hill)", text="Quorl is a hill."),)
    )
    impossible = {**SQUAD_QA, "id": "s2", "answers": [], "is_impossible": True}
    paragraph = {"context": "Quorl is a hill.", "qas": [SQUAD_QA, impossible]}
    two = {"data": [{"title": "Q", "paragraphs": [paragraph]}]}
    left_out: Counter[str] = Counter()
    path = write(tmp_path, "two.json", json.dumps(two, indent=1))
    assert [q.id for q in read_questions(path, left_out=left_out)] == ["s1"]
    assert left_out == {"unanswerable": 1}
    none = {"data": [{"title": "Q", "paragraphs": [{**paragraph, "qas": [impossible]}]}]}
    with pytest.raises(InputError, match="holds no questions; 1 are unanswerable"):
        read_questions(write(tmp_path, "none.json", json.dumps(none)))


def test_popqa(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, "popQA.tsv.gz", POPQA))
    assert question == Question(
        "7", "What is Mira Oss's occupation?", ("climber", "alpinist"), "occupation", (Gold(title="Mira Oss"),)
    )


@pytest.mark.parametrize("record", [CWQ, CWQ_FLAT])
def test_complex_web_questions(tmp_path: Path, record: dict) -> None:
    (question,) = read_questions(write(tmp_path, "cwq.json", [record]))
    assert (question.answers, question.gold) == (("Mira Oss", "M. Oss"), ())


def test_plain_lines(tmp_path: Path) -> None:
    other = {"question": "Why?", "answer": "because", "type": "why", "gold_ids": ["a", "b"], "split": "test"}
    first, second = read_questions(write(tmp_path, "q.jsonl", f"{json.dumps(LINE)}\n\n{json.dumps(other)}\n"))
    assert first == Question("q1", "What is Quorl?", ("a hill",), "fact in a QA pair", (Gold(id="p1"),))
    assert second == Question("3", "Why?", ("because",), "why", (Gold(id="a"), Gold(id="b")), "test")
    nothing = json.dumps({**other, "id": None, "type": None, "split": None})
    (third,) = read_questions(write(tmp_path, "null.jsonl", nothing))
    assert (third.id, third.type, third.split) == ("1", "", "")
    (alone,) = read_questions(write(tmp_path, "one.jsonl", json.dumps(LINE)))
    assert alone == first


def broken(record: dict, **changes: Any) -> dict:
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "content", "where", "field"),
    [
        ("q.jsonl", json.dumps(LINE) + "\nnot json", "line 2", "not JSON"),
        ("q.jsonl", json.dumps(LINE) + "\n[1]", "line 2", "a JSON list"),
        ("q.jsonl", json.dumps(broken(LINE, question=...)), "line 1", "'question': is missing"),
        ("q.jsonl", json.dumps(broken(LINE, answers=[" "])), "line 1", "'answers': has no text"),
        ("q.jsonl", json.dumps(broken(LINE, answers=[])), "line 1", "'answers': has no text"),
        ("q.jsonl", json.dumps(broken(LINE, answers=...)), "line 1", "'answers': is missing"),
        ("q.jsonl", json.dumps(broken(LINE, question=3)), "line 1", "'question': is a int"),
        ("q.jsonl", json.dumps(broken(LINE, answers=[3])), "line 1", "'answers': is not a text"),
        ("q.jsonl", json.dumps(broken(LINE, covered=1)), "line 1", "'covered': is a int"),
        ("h.json", [HOTPOT, broken(HOTPOT, _id=...)], "record 1", "'_id': is missing"),
        ("h.json", [HOTPOT, 3], "record 1", "a JSON int"),
        ("h.json", [broken(HOTPOT, context=[["Quorl"]])], "record 0", "'context': is not a list of"),
        ("h.json", [broken(HOTPOT, supporting_facts=[[0]])], "record 0", "'supporting_facts': is not a list of"),
        ("h.json", [broken(HOTPOT, supporting_facts=..., answer=...)], "record 0", "'answer': is missing"),
        ("w.json", [broken(TWO_WIKI, supporting_facts=[["Nobody", 0]])], "record 0", "'supporting_facts': names"),
        ("w.json", [broken(TWO_WIKI, answer="")], "record 0", "'answer': is empty"),
        ("s.json", broken(SQUAD, data=[{}]), "data[0]", "'paragraphs': is missing"),
        (
            "s.json",
            {"data": [{"paragraphs": [{"context": "x", "qas": [broken(SQUAD_QA, answers=[{}])]}]}]},
            "data[0].paragraphs[0].qas[0]",
            "'text': is missing",
        ),
        ("p.tsv", POPQA.replace('"[""climber""', '"oh'), "line 2", "'possible_answers': is not a JSON list"),
        ("p.tsv", POPQA + "8\tonly two\n", "line 3", "the row has 2 fields, the header has 8"),
        ("p.tsv", POPQA + '8\t"Mira\n9\tOss"\n', "line 3", "a quote is not closed"),
        ("p.tsv", POPQA.replace("subj", "obj"), "line 1", "'obj': is there twice"),
        ("q.jsonl", '{"question": "a?", "answer": "b", "question": "c?"}', "line 1", "the key 'question' comes twice"),
        ("q.jsonl", '{"question": "a?", "answer": "\\ud83d"}', "line 1", "'answer': holds a lone surrogate"),
        ("q.jsonl", '{"question": "\\ud83d?", "answer": "b"}', "line 1", "'question': holds a lone surrogate"),
        ("q.jsonl", '{"question": "a?", "answer": "b", "id": {"n": 1}}', "line 1", "'id': is a dict"),
        ("q.jsonl", '{"question": "a?", "answer": "b", "id": NaN}', "line 1", "'id': is a float"),
        ("c.json", [broken(CWQ, answers=[{"aliases": []}])], "record 0", "'answer': is missing"),
        ("c.json", [broken(CWQ, answers=[{"answer": "a", "aliases": "Bob"}])], "record 0", "'aliases': is a str"),
        ("c.json", [broken(CWQ, answers=[{"answer": "a", "aliases": 7}])], "record 0", "'aliases': is a int"),
        (
            "p.tsv",
            POPQA.replace('"[""climber""', '"' + "[" * 100_000),
            "line 2",
            "'possible_answers': is not a JSON list",
        ),
        ("c.json", [broken(CWQ_FLAT, test_id=None)], "record 0", "'test_id': is a NoneType"),
    ],
)
def test_malformed_files_name_the_record_and_the_field(
    tmp_path: Path, name: str, content: Any, where: str, field: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read_questions(path)
    for part in (path, where, field):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.json", None, "no such file"),
        ("e.jsonl", "", "holds no questions"),
        ("e.json", "[]", "form is not known"),
        ("x.json", "[1, 2", "not JSON"),
        ("deep.json", "[" * 200_000, "not JSON"),
        ("x.json", {"a": 1}, "field 'question'"),
        ("x.json.gz", None, "no such file"),
        ("q.jsonl", json.dumps(LINE) + "\n" + json.dumps(LINE), "two questions have the id 'q1'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = str(tmp_path / name) if content is None else write(tmp_path, name, content)
    with pytest.raises(InputError, match=words):
        read_questions(path)


def test_an_unknown_form(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'xml' is not a form"):
        read_questions(write(tmp_path, "q.jsonl", json.dumps(LINE)), "xml")


def passage(title: str, text: str, *sources: str) -> Passage:
    return Passage(passage_key(title, text), title, text, sources)


def test_gold_passages_by_id_text_and_title(tmp_path: Path) -> None:
    (hop,) = read_questions(write(tmp_path, "hotpot.json", [HOTPOT]))
    whole = passage("Mira Oss", "Mira Oss climbed Quorl.  She was twelve.", "w1")
    piece = passage("Quorl", "It lies in Vend.", "w2#1")
    other = passage("Quorl", "Another text under that title.", "w3")
    elsewhere = passage("Else", "Quorl is a hill.", "w4")
    questions = [
        hop,
        Question("by id", "?", ("x",), gold=(Gold(id="w2"), Gold(id="w4"))),
        Question("by title", "?", ("x",), gold=(Gold(title="else"),)),
        Question("none", "?", ("x",)),
        Question("unknown", "?", ("x",), gold=(Gold(id="w9"),)),
    ]
    index = GoldIndex(questions)
    corpus = [other, elsewhere, piece, whole, make_passage(1)]
    chosen = [p for p in corpus if index.is_gold(p)]
    assert set(chosen) == {whole, piece, elsewhere}
    found = match_gold(questions, chosen)
    assert found == {
        "h1": (whole, piece),
        "by id": (piece, elsewhere),
        "by title": (elsewhere,),
        "none": (),
        "unknown": (),
    }


def test_a_record_whose_id_looks_like_a_part_is_not_gold_for_another(tmp_path: Path) -> None:
    questions = [Question("1", "?", ("x",), gold=(Gold(id="C"),)), Question("2", "?", ("x",), gold=(Gold(id="D"),))]
    corpus = [passage("", f"Text of {source}.", source) for source in ("C", "C#5", "D#0", "D#1", "D#²")]
    index = GoldIndex(questions)
    found = match_gold(questions, [p for p in corpus if index.is_gold(p)])
    assert {id: [p.sources[0] for p in passages] for id, passages in found.items()} == {"1": ["C"], "2": ["D#0", "D#1"]}
