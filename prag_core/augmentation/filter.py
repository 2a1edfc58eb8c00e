"""The draft of a passage's augmentation, and the filter for its pairs and rewrites."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prag_core.augmentation.prompts import INVENTED_NAMES
from prag_core.errors import GenerationError
from prag_core.identity import normalize
from prag_core.prompts import passage_text
from prag_core.records import Passage, QAPair

_QUESTION_WORDS = 40
_ANSWER_WORDS = 25
_FULL_ANSWER_WORDS = 80
# A rewrite that shares more than this part of its three-word sequences with the passage is a copy.
_COPIED_SHARE = 0.9
_SHORTEST_REWRITE_SHARE = 0.3
# A rewrite that keeps less than this part of the passage's long words is about something else, often about rewriting.
_KEPT_SHARE = 0.2
# A rewrite with a smaller share of distinct three-word sequences repeats itself.
_DISTINCT_SHARE = 0.7
_LONG_WORD = re.compile(r"\w{5,}")
# How many questions with one answer a passage may have: a fact may be asked about in two wordings.
_WORDINGS = 2
# Two answers that share this part of their words are one fact. Where each has words of its own, it must be more.
_SAME_FACT = 0.6
_SAME_FACT_IN_OTHER_WORDS = 0.8
# Words that an answer may have and its passage need not.
_SMALL_WORDS = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "to", "for", "and", "or", "by", "with", "from", "as")
)
_PRONOUN = re.compile(r"(?<=\w )(?:(he|she|it|they|him|them)|(his|her|its|their))\b(?! own\b)", re.IGNORECASE)
_NAME = re.compile(r"(?<=\w )[^\W\d_a-z]\w")
_TITLE_WORD = re.compile(r"\w{4,}")
_DISAMBIGUATION = re.compile(r"\s*\([^()]*\)\s*\Z")
# What speaks of the task, or looks like a mark around a reply, belongs to no rewrite unless the passage has it.
_ABOUT_THE_TASK = re.compile(
    r"\bre-?(?:writ|word|phras)\w*|\bparaphras\w*|\bthe passage\b"
    r"|</?[a-z_][\w:-]*>|<[|｜][^<>\s]*[|｜]>|\[/?(?:think|inst|begin|end)[a-z_ ]*\]",
    re.IGNORECASE,
)


def fold_text(text: str) -> str:
    """Return `text` as the filter compares it: without case and with single spaces.

    Evaluation has another rule, `prag_core.data.questions.normalize_answer`. Changing this one changes augmentations.
    """
    return normalize(text).casefold()


def contains_text(text: str, part: str) -> bool:
    """Whether `part` occurs in `text` as whole words, ignoring case and white space."""
    part = fold_text(part)
    if not part:
        return False
    before = r"(?<!\w)" if part[0].isalnum() else ""
    after = r"(?!\w)" if part[-1].isalnum() else ""
    return re.search(before + re.escape(part) + after, fold_text(text)) is not None


def find_text(text: str, part: str) -> tuple[int, int] | None:
    """Return where `part` begins and ends in `text`, as whole words and numbers, ignoring case and white space."""
    words = r"\s+".join(map(re.escape, part.split()))
    before = r"(?<!\w)(?<!\d[.,])" if part[:1].isalnum() else ""
    after = r"(?!\w|[.,]\d)" if part[-1:].isalnum() else ""
    found = re.search(f"{before}{words}{after}", text, re.IGNORECASE) if words else None
    return found.span() if found else None


def refusal(pair: QAPair, passage: Passage, accepted: Sequence[QAPair]) -> str | None:
    """Return the reason for refusing a pair, or None to accept it; `accepted` are the passage's pairs so far.

    The reasons are `empty`, `no_question_mark`, `too_long`, `prompt_copy` (it has an invented name of the prompt's
    examples), `no_subject` (it can be understood only beside its passage), `answer_in_question`,
    `answer_not_in_passage`, `duplicate_question` and `duplicate_answer` (a third question with one answer). The
    strategies add `bad_json` (`paper`), `bad_line` (`lines`) and `answered_otherwise` (`writer`), `bad_rewrite` for a
    text that is no rewrite, and `no_reply` if the last attempt failed.
    """
    source = passage_text(passage)
    question, answer = fold_text(pair.question), fold_text(pair.answer)
    if not question.rstrip(" ?") or not answer or not pair.full_answer.strip():
        return "empty"
    if not question.endswith("?"):
        return "no_question_mark"
    words = (len(text.split()) for text in (question, answer, pair.full_answer))
    limits = (_QUESTION_WORDS, _ANSWER_WORDS, _FULL_ANSWER_WORDS)
    if any(count > limit for count, limit in zip(words, limits, strict=True)):
        return "too_long"
    copied = (name for name in INVENTED_NAMES if contains_text(f"{question} {answer}", name))
    if any(not contains_text(source, name) for name in copied):
        return "prompt_copy"
    if _PRONOUN.search(pair.question) and not _names_subject(pair.question, passage.title):
        return "no_subject"
    if contains_text(question, answer):
        return "answer_in_question"
    if not contains_text(source, answer) and not _words(answer) - _SMALL_WORDS <= _words(source):
        return "answer_not_in_passage"
    if any(fold_text(other.question) == question for other in accepted):
        return "duplicate_question"
    if sum(fold_text(other.answer) == answer for other in accepted) >= _WORDINGS:
        return "duplicate_answer"
    return None


def is_same_fact(one: str, other: str) -> bool:
    """Return whether two answers about one passage are the same but for a few words, such as "a poet" and "poet".

    Two days of one month, or two people of one family, are not the same.
    """
    left, right = (_words(answer) - _SMALL_WORDS or _words(answer) or {fold_text(answer)} for answer in (one, other))
    least = _SAME_FACT if left <= right or right <= left else _SAME_FACT_IN_OTHER_WORDS
    return 2 * len(left & right) >= least * (len(left) + len(right))


def name_subject(question: str, passage: Passage) -> str:
    """Return a question with the passage's title for its first pronoun, if it names nothing itself.

    "When was she born?" becomes "When was Ada Lovelace born?". Models write such questions about biographies.
    """
    title = _DISAMBIGUATION.sub("", passage.title)
    if not title or _names_subject(question, title):
        return question
    return _PRONOUN.sub(lambda found: title if found[1] else f"{title}'s", question, count=1)


def _names_subject(question: str, title: str) -> bool:
    return _NAME.search(question) is not None or any(
        contains_text(question, word) for word in _TITLE_WORD.findall(title)
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", fold_text(text)))


def is_rewrite(text: str, passage: Passage) -> bool:
    """Whether `text` is a usable rewrite: long enough, on the subject, not a copy, and without repetitions.

    A text that speaks of rewriting is none either: it is reasoning or a remark, or repeats the prompt.
    """
    words, original = fold_text(text).split(), fold_text(passage.text).split()
    source = fold_text(passage_text(passage))
    if any(found not in source for found in _ABOUT_THE_TASK.findall(fold_text(text))):
        return False
    if not words or len(words) < _SHORTEST_REWRITE_SHARE * len(original):
        return False
    long_words = set(_LONG_WORD.findall(fold_text(passage.text)))
    if len(long_words & set(_LONG_WORD.findall(fold_text(text)))) < _KEPT_SHARE * len(long_words):
        return False
    in_passage, in_rewrite = set(_trigrams(original)), _trigrams(words)
    if len(set(in_rewrite)) < _DISTINCT_SHARE * len(in_rewrite):
        return False
    return sum(trigram in in_passage for trigram in in_rewrite) <= _COPIED_SHARE * len(in_rewrite)


def _trigrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


@dataclass
class Draft:
    """The augmentation of one passage while it is made. `wanted` is how many pairs it should have.

    `unasked` are facts for which the writer has no good question, each as (answer, sentence). `error` is the last
    attempt's. `reasons` says that a reply was cut off in its reasoning, so later ones need room.
    """

    passage: Passage
    wanted: int
    rewrites: list[str] = field(default_factory=list)
    pairs: list[QAPair] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    unasked: list[tuple[str, str]] = field(default_factory=list)
    attempts: int = 0
    error: GenerationError | None = None
    reasons: bool = False

    def offer(self, pair: QAPair) -> bool:
        """Accept the pair, its subject named, or count the reason for refusing it; return whether it is accepted."""
        pair = replace(pair, question=name_subject(pair.question, self.passage))
        if reason := refusal(pair, self.passage, self.pairs):
            self.refused[reason] += 1
            return False
        self.pairs.append(pair)
        return True
