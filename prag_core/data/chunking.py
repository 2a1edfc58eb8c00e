"""Splits a text at sentence ends: into sentences, or into passages."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

# Chinese and Japanese have no spaces, so each of their characters counts as a word, with the punctuation after it.
# In other scripts, a run of more than 50 characters counts as several words, so that every text has a limit.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A stop, closing quotes if any, a space, and no small letter after it. The quantifiers are possessive, and a match
# starts only where a run of stops starts, so the time is linear even for a million dots.
# Changing it changes passages and augmentations: raise `prag_core.recipe.RULE_VERSION`.
_SENTENCE_END = re.compile(r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s++[^a-z])|[。！？]++["'”’」』）)]*+""")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Nos?|Jr|Sr|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Gov|Sen|Rep|Mt|Ft|vs|etc|Inc|Ltd|Co|Corp"
    r"|Vol|Fig|pp|[^\W\d_a-z])\.$"
)
_WORD = re.compile(rf"[{_CJK}][、。，．！？…」』）]*|[^\s{_CJK}]{{1,50}}")


def split_text(text: str, max_words: int) -> list[str]:
    """Split a text at sentence ends into as few pieces of at most `max_words` words as possible, of similar size.

    A sentence over the limit is split between words. Each Chinese or Japanese character counts as a word.
    """
    words = [match.start() for match in _WORD.finditer(text)]
    if len(words) <= max_words:
        return [text]
    sentences = sorted({0, len(words), *(bisect.bisect_left(words, end) for end in _sentence_ends(text))})
    # 1. The positions of possible cuts, in words: each sentence end, and even steps within a sentence over the limit.
    cuts = [0]
    for end in sentences[1:]:
        start, parts = cuts[-1], -(-(end - cuts[-1]) // max_words)
        cuts += [start + (end - start) * part // parts for part in range(1, parts + 1)]
    # 2. The lowest limit that still needs the fewest pieces makes the pieces most similar in size.
    longest = max(end - start for start, end in pairwise(cuts))
    fewest = len(_fill(cuts, max_words))
    limits = range(longest, max_words + 1)
    limit = limits[bisect.bisect_left(limits, True, key=lambda limit: len(_fill(cuts, limit)) <= fewest)]
    bounds = [*(words[start] for start in _fill(cuts, limit)), len(text)]
    return [text[start:end].strip() for start, end in pairwise(bounds)]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without white space around them."""
    bounds = [0, *_sentence_ends(text), len(text)]
    return [sentence for start, end in pairwise(bounds) if (sentence := text[start:end].strip())]


def _sentence_ends(text: str) -> Iterator[int]:
    for found in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text, found.start() - 9, found.end()):
            yield found.end()


def _fill(cuts: Sequence[int], limit: int) -> list[int]:
    """Return the starts of the pieces, if each is filled up to `limit` words."""
    starts = [0]
    for start, end in pairwise(cuts):
        if end - starts[-1] > limit:
            starts.append(start)
    return starts
