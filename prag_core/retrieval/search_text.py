"""The form in which a text is indexed and searched; it must be the same for both.

Raise the `INDEX_RULE` of each kind that uses it when it changes: an index of other texts would find less, and say
nothing.
"""

from __future__ import annotations

import unicodedata

# Characters that a reader does not see, but that would be part of a word: soft hyphens, marks of the writing
# direction, word joiners, byte order marks, fillers, variation selectors, tags: all that Unicode calls ignorable by
# default. But the joiners U+200C and U+200D stay: in some scripts they tell words apart. So does U+200B, a space.
_INVISIBLE = (
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x200E, 0x200F, 0x3164, 0xFEFF, 0xFFA0),
    *(*range(0x180B, 0x1810), *range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFFF0, 0xFFF9)),
    *(*range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B)),
)
_SELECTORS = (*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000))
# The normal form would take an acute accent that stands alone for a space with an accent.
_BEFORE: dict[int, str | None] = {**dict.fromkeys((*_INVISIBLE, *_SELECTORS)), 0xB4: "'"}
# By Unicode's rules for words, which Lucene follows, these join what is beside them: `Subject:meeting` would be one
# word. Apostrophes have one form, so that `don’t` is `don't`.
_SEPARATORS = ":_‿⁀⁔"
_APOSTROPHES = "’‘‛ʼʻ`"
# The sigma at the end of a Greek word is a small letter of its own: of ΟΔΟΣ, Lucene makes οδοσ.
_AFTER = str.maketrans(_SEPARATORS + _APOSTROPHES + "ς", " " * len(_SEPARATORS) + "'" * len(_APOSTROPHES) + "σ")


def search_text(text: str) -> str:
    """Return a text as it is indexed and searched: in Unicode's normal form KC, with the same marks for the same thing.

    Form KC makes one of composed and decomposed letters, of ligatures and letters, of full-width and plain ones.
    """
    if text.isascii():
        return text.translate(_AFTER)
    composed = unicodedata.normalize("NFKC", text.translate(_BEFORE)).translate(_AFTER)
    # Form KC takes the Thai vowel Sara Am apart, by which Thai words are known.
    return composed.replace("\u0e4d\u0e32", "\u0e33")
