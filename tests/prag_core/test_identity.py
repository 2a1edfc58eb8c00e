"""Identity is content: keys, canonical JSON, fingerprints."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prag_core.identity import canonical_json, checksum, fingerprint, is_intact, passage_key, seal


def test_white_space_and_unicode_form_do_not_make_another_passage() -> None:
    assert passage_key("Caf\u00e9", "a  b\n c ") == passage_key("Cafe\u0301", " a b c")
    assert passage_key("A", "b") != passage_key("A b", "")
    assert passage_key("A", "b") != passage_key("a", "b")
    # Pinned: a changed rule would make every adapter of every store anew.
    assert passage_key("Title", "Some text.") == "12506e4d604824b5f066b7e707abcab2"


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_the_order_of_keys_does_not_matter(value: dict) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(list(value.items()))))


def test_whole_floats_are_the_integers_that_they_mean() -> None:
    assert canonical_json({"epochs": 4.0}) == canonical_json({"epochs": 4}) == '{"epochs":4}'


@pytest.mark.parametrize("value", [{1, 2}, object(), {1: "a"}, b"bytes"])
def test_what_could_differ_between_runs_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"\$\.inside"):
        canonical_json({"inside": value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_floats_without_json_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="canonical"):
        canonical_json([value])


def test_checksums_see_every_byte() -> None:
    assert checksum(b"abc") != checksum(b"abd")
    assert checksum(b"abc") == checksum(memoryview(b"xabcx")[1:4])


def test_a_seal_shows_any_change() -> None:
    document = json.loads(json.dumps(seal({"a": [1, 2.5], "b": {"c": None}})))
    assert is_intact(document)
    assert not is_intact({**document, "a": [1, 2.25]})
    assert not is_intact({**document, "d": 1})
    assert is_intact({"a": 1})  # made before there were seals
