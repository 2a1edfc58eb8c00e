"""EM and F1 as SQuAD defines them (expected values by hand), and the bootstrap."""

from __future__ import annotations

import pytest

from prag_core.evaluate import exact_match, f1, normalize_answer, paired_bootstrap


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "expected"),
    [
        ("The Cat.", ["cat"], 1.0, 1.0),
        ("a cat sat", ["the cat"], 0.0, 2 / 3),
        ("St. Louis.", ["St. Louis"], 1.0, 1.0),
        ("15,140.", ["15,140"], 1.0, 1.0),
        ("dog", ["cat", "big dog"], 0.0, 2 / 3),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("yes", ["no"], 0.0, 0.0),
        ("one one two", ["one"], 0.0, 0.5),
    ],
)
def test_scores(prediction: str, answers: list[str], em: float, expected: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(expected)


def test_normalization() -> None:
    assert normalize_answer("  The  an-swer,\tis: A Test! ") == "answer is test"


def test_the_bootstrap_draws_passages() -> None:
    left, right = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    mean, low, high = paired_bootstrap(left, right, ["a", "a", "b", "b"])
    # Two passages: a draw is both a (1), both b (0) or one of each (0.5).
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert paired_bootstrap(left, right, ["a", "a", "b", "b"]) == (mean, low, high)
    steady = paired_bootstrap([0.6] * 40, [0.1] * 40, [i // 2 for i in range(40)])
    assert steady == pytest.approx((0.5, 0.5, 0.5))
