"""An index kind without Java: a JSON file of passages, searched by the words that they share with the question."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from prag_core.config import IndexConfig
from prag_core.records import Hit, Passage, from_dict

INDEX_RULE = 1
SEARCH_SETTINGS = frozenset({"k1", "b"})
PROCESS_ENV = {"WORD_INDEX": "1"}
REQUIREMENT = "nothing"


def find_requirement() -> Path:
    return Path()


def writer_version() -> str:
    return "words 1"


def build_index(passages: Iterable[Passage], directory: Path, config: IndexConfig) -> int:
    rows = [dataclasses.asdict(passage) for passage in passages]
    directory.mkdir()
    (directory / "passages.json").write_text(json.dumps(rows))
    return len(rows)


def update_index(directory: Path, gone: Iterable[str], passages: Iterable[Passage], config: IndexConfig) -> int:
    gone = set(gone)
    rows = [row for row in json.loads((directory / "passages.json").read_text()) if row["key"] not in gone]
    rows += [dataclasses.asdict(passage) for passage in passages]
    (directory / "passages.json").write_text(json.dumps(rows))
    return len(rows)


class WordRetriever:
    def __init__(self, directory: Path, config: IndexConfig) -> None:
        self._passages = [from_dict(Passage, row) for row in json.loads((directory / "passages.json").read_text())]

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        words = set(question.lower().split())
        hits = [Hit(p, float(len(words & set(p.text.lower().split())))) for p in self._passages]
        found = [hit for hit in hits if hit.score > 0 and hit.score >= min_score]
        return sorted(found, key=lambda hit: (-hit.score, hit.passage.key))[:top_k]

    def close(self) -> None:
        pass


open_retriever = WordRetriever
