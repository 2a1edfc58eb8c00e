"""The gold passages of questions, found again in a corpus."""

from __future__ import annotations

from collections.abc import Sequence

from prag_core.data.questions import Gold, Question
from prag_core.records import Passage

# ---- gold passages in a corpus


class GoldIndex:
    """Tells which passages of a corpus are the gold ones of some questions.

    By id: a passage that came under it, or a piece of the record of that id. By text: a passage with the same
    letters and digits, or, under the same title, a piece of the gold text. By title alone: each passage under it.
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
        of_title = self._titles.get(_letters(passage.title), [])
        return text in self._texts or any(not whole or text in whole for whole in of_title)


def match_gold(questions: Sequence[Question], passages: Sequence[Passage]) -> dict[str, tuple[Passage, ...]]:
    """Return each question's gold passages, by its id, among those that a `GoldIndex` chose, in a fixed order."""
    by_id: dict[str, list[Passage]] = {}
    by_text: dict[str, list[Passage]] = {}
    by_title: dict[str, list[Passage]] = {}
    for passage in sorted(passages, key=lambda p: (p.sources, p.key)):
        for name in {n for source in passage.sources for n in (source, record_id(source))}:
            by_id.setdefault(name, []).append(passage)
        by_text.setdefault(_letters(passage.text), []).append(passage)
        by_title.setdefault(_letters(passage.title), []).append(passage)

    def of(gold: Gold) -> list[Passage]:
        if gold.id:
            return by_id.get(gold.id, [])
        whole, under_title = _letters(gold.text), by_title.get(_letters(gold.title), []) if gold.title else []
        if not whole:
            return under_title
        return by_text.get(whole) or [p for p in under_title if _letters(p.text) in whole]

    found = {q.id: [p for gold in q.gold for p in of(gold)] for q in questions}
    return {id: tuple({p.key: p for p in passages}.values()) for id, passages in found.items()}


def record_id(source: str) -> str:
    """Return the id of the record that a passage's source is, or is a piece of (`id#0`, `id#1`, …)."""
    head, mark, number = source.rpartition("#")
    return head if mark and number.isdigit() else source


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
