"""Finds the gold passages of questions in a corpus."""

from __future__ import annotations

from collections.abc import Sequence

from prag_core.data.questions import Gold, Question
from prag_core.identity import normalize
from prag_core.records import Passage


class GoldIndex:
    """Finds which passages of a corpus are gold passages of the given questions.

    A gold id matches the passages with that source; if there is none, the pieces of the record with that id. A gold
    text matches passages with the same letters and digits; with a title it also matches the passages under that title
    that are a part of it. A title alone matches every passage under it.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        gold = {gold for question in questions for gold in question.gold}
        self._ids = {g.id for g in gold if g.id}
        self._texts = {_letters(g.text) for g in gold if g.text}
        self._titles: dict[str, list[str]] = {}
        for g in gold:
            if g.title and not g.id:
                self._titles.setdefault(_letters(g.title), []).append(_letters(g.text))

    def is_gold(self, passage: Passage) -> bool:
        """Whether a passage is gold for some question."""
        if any(record_id(source) in self._ids or source in self._ids for source in passage.sources):
            return True
        text = _letters(passage.text)
        gold_texts = self._titles.get(_letters(passage.title), [])
        return text in self._texts or any(not whole or text in whole for whole in gold_texts)


def match_gold(questions: Sequence[Question], passages: Sequence[Passage]) -> dict[str, tuple[Passage, ...]]:
    """Return the gold passages of each question, by its id, in a fixed order.

    `passages` are those that a `GoldIndex` of these questions found.
    """
    by_source: dict[str, list[Passage]] = {}
    by_record: dict[str, list[Passage]] = {}
    by_text: dict[str, list[Passage]] = {}
    by_title: dict[str, list[Passage]] = {}
    for passage in sorted(passages, key=lambda p: (p.sources, p.key)):
        for source in passage.sources:
            by_source.setdefault(source, []).append(passage)
        for name in sorted({record_id(source) for source in passage.sources}):
            by_record.setdefault(name, []).append(passage)
        by_text.setdefault(_letters(passage.text), []).append(passage)
        by_title.setdefault(_letters(passage.title), []).append(passage)

    def find(gold: Gold) -> list[Passage]:
        if gold.id:
            # A record that is whole has no pieces: then `C#5` is another record beside `C`.
            return by_source.get(gold.id) or by_record.get(gold.id, [])
        whole, under_title = _letters(gold.text), by_title.get(_letters(gold.title), []) if gold.title else []
        if not whole:
            return under_title
        return by_text.get(whole) or [p for p in under_title if _letters(p.text) in whole]

    found = {q.id: [p for gold in q.gold for p in find(gold)] for q in questions}
    return {id: tuple({p.key: p for p in passages}.values()) for id, passages in found.items()}


def record_id(source: str) -> str:
    """Return the id of the record of a passage's source: the source itself, without `#0`, `#1`, … of a piece."""
    head, mark, number = source.rpartition("#")
    return head if mark and number.isascii() and number.isdigit() else source


def _letters(text: str) -> str:
    """Return the letters and digits of a text, without case; see `normalize_answer` for the other rules."""
    return "".join(c for c in normalize(text).casefold() if c.isalnum())
