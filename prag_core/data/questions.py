"""The record of a question with its accepted answers, and how answers are compared."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Gold:
    """A passage that supports an answer, as the question set names it: by its id, its title or its text."""

    id: str = ""
    title: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with all its accepted answers; `type` is the kind of question, in the words of its set."""

    id: str
    question: str
    answers: tuple[str, ...]
    type: str = ""
    gold: tuple[Gold, ...] = ()
    split: str = ""


def normalize_answer(text: str) -> str:
    """Return `text` in lower case, without ASCII punctuation and English articles, with single spaces.

    This is SQuAD's rule for comparing answers, and composed letters equal decomposed ones. Other rules:
    `prag_core.identity.normalize` for keys, `prag_core.data.gold` for gold texts,
    `prag_core.augmentation.filter.fold_text` for augmentations, `prag_core.retrieval.search_text` for searching.
    """
    composed = unicodedata.normalize("NFC", text)
    return " ".join(_ARTICLES.sub(" ", composed.lower().translate(_PUNCTUATION)).split())
