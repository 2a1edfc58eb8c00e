"""The example corpus is what its users are told it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ATLAS = Path(__file__).parents[1] / "pipelines" / "examples" / "atlas"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ATLAS / name).read_text(encoding="utf-8").splitlines()]


PASSAGES = {row["id"]: row for row in rows("passages.jsonl")}
AUGMENTATIONS = {row["id"]: row for row in rows("augmentations.jsonl")}
QUESTIONS = rows("questions.jsonl")


def test_counts() -> None:
    assert len(PASSAGES) == len(AUGMENTATIONS) == 64
    assert len(QUESTIONS) == 256
    assert sum(row["near_duplicate_of"] is not None for row in PASSAGES.values()) == 16
    assert len({row["title"] for row in PASSAGES.values()}) == 64


@pytest.mark.parametrize("id", sorted(PASSAGES))
def test_a_passage_and_its_augmentation(id: str) -> None:
    passage, augmentation = PASSAGES[id], AUGMENTATIONS[id]
    assert 60 <= len(passage["text"].split()) <= 120
    assert passage["near_duplicate_of"] is None or passage["near_duplicate_of"] in PASSAGES
    assert len(augmentation["rewrites"]) == 1
    answers = [pair["answer"] for pair in augmentation["qa"]]
    assert 12 <= len(answers) <= 24
    assert len(answers) > len(set(answers)) >= 12  # all kinds of facts, and some of them in two wordings
    for pair in augmentation["qa"]:
        assert pair["question"].endswith("?")
        assert pair["answer"].lower() in f"{passage['title']}\n{passage['text']}".lower()
        assert pair["answer"].lower() in pair["full_answer"].lower()
        assert pair["answer"].lower() not in pair["question"].lower()


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q["id"])
def test_a_question(question: dict) -> None:
    passage, pairs = PASSAGES[question["passage_id"]], AUGMENTATIONS[question["passage_id"]]["qa"]
    answer = question["answers"][0].lower()
    assert answer in passage["text"].lower()
    assert answer not in question["question"].lower()
    assert question["question"].lower() not in {pair["question"].lower() for pair in pairs}
    overlaps = [answer in pair["answer"].lower() or pair["answer"].lower() in answer for pair in pairs]
    assert any(overlaps) == question["covered"]


def test_the_halves_are_split_by_passage() -> None:
    halves = {split: {q["passage_id"] for q in QUESTIONS if q["split"] == split} for split in ("dev", "test")}
    assert not halves["dev"] & halves["test"]
    assert len(halves["dev"]) == len(halves["test"]) == 32
    for row in PASSAGES.values():
        original = row["near_duplicate_of"]
        assert original is None or any({row["id"], original} <= half for half in halves.values())


def test_the_demo_has_twelve_of_the_held_out_augmentations() -> None:
    first = list(PASSAGES)[:16]
    demo = rows("demo_augmentations.jsonl")
    assert [row["id"] for row in demo] == [id for id in first if id in {row["id"] for row in demo}]
    assert len(demo) == 12
    assert all(row == AUGMENTATIONS[row["id"]] for row in demo)
    assert {q["split"] for q in QUESTIONS if q["passage_id"] in first} == {"test"}
