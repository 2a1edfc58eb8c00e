"""The form in which texts are indexed and searched."""

from __future__ import annotations

import unicodedata

import pytest

from prag_core.retrieval.search_text import search_text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("Ｔｏｋｙｏ　１２", "Tokyo 12"),
        ("\ufb01nance", "finance"),
        ("ﾄｳｷｮｳ", "トウキョウ"),
        ("don’t", "don't"),
        ("don＇t", "don't"),
        ("donʼt", "don't"),
        ("don´t", "don't"),
        ("don`t", "don't"),
        ("Hawaiʻi", "Hawai'i"),
        ("Subject:meeting", "Subject meeting"),
        ("Subject：meeting", "Subject meeting"),
        ("Subject﹕meeting", "Subject meeting"),
        ("snake_case", "snake case"),
        ("snake＿case", "snake case"),
        ("a‿b", "a b"),
        ("10\u202f000", "10 000"),
        ("co\u00adoperate", "cooperate"),
        ("\ufeffword\u200e", "word"),
        ("word\u2060joiner", "wordjoiner"),
        ("Caz\u034fambra", "Cazambra"),
        ("zan\u180ethor", "zanthor"),
        ("ha\u3164lf\uffa0", "half"),
        ("Uni\U000e0041corn", "Unicorn"),
        ("οδός", "οδόσ"),
        ("葛\U000e0100城", "葛城"),
        ("น้ำ", unicodedata.normalize("NFKD", "น้ำ")),
    ],
    ids=ascii,
)
def test_two_spellings_of_the_same_are_searched_as_one(one: str, other: str) -> None:
    assert search_text(one) == search_text(other)
    assert search_text(search_text(one)) == search_text(one)


@pytest.mark.parametrize(
    "text", ["well-known U.S.A. 3.5", "می\u200cشود", "น้ำ", "zero\u200bwidth", "col·lecció", "a\nb", ""]
)
def test_what_tells_words_apart_stays(text: str) -> None:
    assert search_text(text) == text
