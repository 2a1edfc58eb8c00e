"""Coverage: the share of a passage's facts that its question-answer pairs ask about.

An adapter that is trained on questions alone holds hardly anything that no pair asks about. So a low coverage tells
before any training which passages will be forgotten in part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prag_core.augmentation.answer_rules import find_answers
from prag_core.augmentation.filter import contains_text
from prag_core.augmentation.sentences import sentences_of, topic_of
from prag_core.records import Passage, QAPair

# A sentence with fewer words of this length states nothing that a question could ask about.
_CONTENT_WORDS = 3
_CONTENT_WORD = re.compile(r"\w{4,}")


def uncovered(passage: Passage, pairs: Sequence[QAPair]) -> tuple[list[str], int]:
    """Return the facts of a passage that no pair asks about, and the number of all its facts.

    The facts are its names, dates and numbers, as English rules find them, and its sentences. A pair asks about a
    name, date or number if its answer holds it or is a part of it, and about a sentence that holds its answer.
    """
    sentences = [s for s in sentences_of(passage) if len(_CONTENT_WORD.findall(s)) >= _CONTENT_WORDS]
    spans = dict.fromkeys(candidate.answer for candidate in find_answers(topic_of(passage), sentences))
    answers = [pair.answer for pair in pairs]
    missed = [
        span
        for span in spans
        if not any(contains_text(answer, span) or contains_text(span, answer) for answer in answers)
    ]
    missed += [text for text in sentences if not any(contains_text(text, answer) for answer in answers)]
    return missed, len(spans) + len(sentences)


def coverage(passage: Passage, pairs: Sequence[QAPair]) -> float:
    """Return the share of a passage's facts that its pairs ask about, from 0 to 1; 1 for a passage without facts."""
    missed, count = uncovered(passage, pairs)
    return 1.0 - len(missed) / count if count else 1.0
