"""EM, F1 and the paper's F1 on 200 predictions whose scores are known without our code, and the bootstrap."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from prag_core.data.questions import normalize_answer
from prag_core.evaluation.metrics import (
    contains_answer,
    exact_match,
    f1,
    hotpot_f1,
    paired_bootstrap,
    paper_answer,
    paper_exact_match,
    paper_f1,
    recall_at_k,
)

# By hand: prediction, accepted answers, EM, SQuAD F1, HotpotQA F1, the paper's EM and F1 (which cut the answer).
BY_HAND = [
    ("The Cat.", ["cat"], 1, "1", "1", 1, "1"),
    ("a cat sat", ["the cat"], 0, "2/3", "2/3", 0, "2/3"),
    ("St. Louis.", ["St. Louis"], 1, "1", "1", 0, "2/3"),
    ("St. Louis", ["Saint Louis"], 0, "1/2", "1/2", 0, "0"),
    ("15,140.", ["15,140"], 1, "1", "1", 0, "0"),
    ("15,140", ["15"], 0, "0", "0", 1, "1"),
    ("3.5 million", ["3.5 million"], 1, "1", "1", 0, "0"),
    ("3.5 million", ["3", "35 million"], 1, "1", "1", 1, "1"),
    ("Paris, France", ["Paris"], 0, "2/3", "2/3", 1, "1"),
    ("Paris, France", ["Paris, France"], 1, "1", "1", 0, "2/3"),
    ("Paris\nIt lies on the Seine", ["Paris"], 0, "1/3", "1/3", 1, "1"),
    ("  Paris  ", ["Paris"], 1, "1", "1", 1, "1"),
    ("Washington, D.C.", ["Washington, D.C."], 1, "1", "1", 0, "2/3"),
    ("U.S.", ["US"], 1, "1", "1", 0, "0"),
    ("J. R. R. Tolkien", ["J. R. R. Tolkien"], 1, "1", "1", 0, "2/5"),
    ("Tolkien", ["J. R. R. Tolkien"], 0, "2/5", "2/5", 0, "2/5"),
    ("dog", ["cat", "big dog"], 0, "2/3", "2/3", 0, "2/3"),
    ("big dog", ["dog", "big dog", "cat"], 1, "1", "1", 1, "1"),
    ("", ["cat"], 0, "0", "0", 0, "0"),
    (".", ["cat"], 0, "0", "0", 0, "0"),
    (", cat", ["cat"], 1, "1", "1", 0, "0"),
    ("", [""], 1, "1", "0", 1, "0"),
    ("the", ["a"], 1, "1", "0", 1, "0"),
    ("the", ["cat"], 0, "0", "0", 0, "0"),
    ("yes", ["yes"], 1, "1", "1", 1, "1"),
    ("Yes.", ["yes"], 1, "1", "1", 1, "1"),
    ("yes", ["no"], 0, "0", "0", 0, "0"),
    ("yes it is", ["yes"], 0, "1/2", "0", 0, "0"),
    ("Yes, it is", ["yes"], 0, "1/2", "0", 1, "1"),
    ("yes", ["yes it is"], 0, "1/2", "0", 0, "0"),
    ("no", ["no", "it is not"], 1, "1", "1", 1, "1"),
    ("No!", ["no"], 1, "1", "1", 1, "1"),
    ("noanswer", ["noanswer given"], 0, "2/3", "0", 0, "0"),
    ("no answer", ["no"], 0, "2/3", "0", 0, "0"),
    ("one one two", ["one"], 0, "1/2", "1/2", 0, "1/2"),
    ("one one", ["one one two"], 0, "4/5", "4/5", 0, "4/5"),
    ("one", ["one one one"], 0, "1/2", "1/2", 0, "1/2"),
    ("Anna Pavlova", ["Pavlova Anna"], 0, "1", "1", 0, "1"),
    ("an-swer", ["answer"], 1, "1", "1", 1, "1"),
    ("rock-and-roll", ["rock and roll"], 0, "0", "0", 0, "0"),
    ("O'Neill", ["ONeill"], 1, "1", "1", 1, "1"),
    ("O’Neill", ["O'Neill"], 0, "0", "0", 0, "0"),
    ("Málaga", ["Malaga"], 0, "0", "0", 0, "0"),
    ("MÁLAGA", ["málaga"], 1, "1", "1", 1, "1"),
    ("東京", ["東京"], 1, "1", "1", 1, "1"),
    ("東京。", ["東京"], 0, "0", "0", 0, "0"),
    ("$5", ["5"], 1, "1", "1", 1, "1"),
    ("5 %", ["5"], 1, "1", "1", 1, "1"),
    ("1984–1990", ["1984-1990"], 0, "0", "0", 0, "0"),
    ("March 3, 1967", ["3 March 1967"], 0, "1", "1", 0, "4/5"),
    ("3 March 1967", ["March 3, 1967"], 0, "1", "1", 0, "1"),
    ("a an the", ["the"], 1, "1", "0", 1, "0"),
    ("theatre", ["the atre"], 0, "0", "0", 0, "0"),
    ("A-Team", ["team"], 0, "0", "0", 0, "0"),
    ("in 1984", ["1984"], 0, "2/3", "2/3", 0, "2/3"),
    ("1984.\n", ["1984"], 1, "1", "1", 1, "1"),
    ("\n1984", ["1984"], 1, "1", "1", 1, "1"),
    ("The answer is 1984.", ["1984"], 0, "1/2", "1/2", 0, "1/2"),
    ("red; green", ["green"], 0, "2/3", "2/3", 0, "2/3"),
    ("red\tgreen", ["red green"], 1, "1", "1", 1, "1"),
]


def constructed(count: int) -> list[tuple[str, list[str], float, Fraction]]:
    """Predictions that share exactly `c` words with an answer and have `p` and `g` of their own: F1 = 2c/(2c+p+g)."""
    rng = random.Random(7)
    made = []
    for _ in range(count):
        c, p, g = rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4)
        p, g = (max(p, 1), max(g, 1)) if c == 0 else (p, g)
        common = [f"word{i}" for i in range(c)]
        found, wanted = [*common, *(f"mine{i}" for i in range(p))], [*common, *(f"gold{i}" for i in range(g))]
        exact = p == g == 0
        if not exact:
            rng.shuffle(found)
        # What normalization takes away: capitals, articles, marks within and around words, white space.
        shown = [rng.choice([w, w.upper(), w.title(), f'"{w}"', f"{w}!", f"{w[0]}-{w[1:]}", f"the {w}"]) for w in found]
        prediction = rng.choice([" ", "  ", "\t"]).join(shown) + rng.choice(["", "?", " a"])
        answers = [" ".join(wanted)] + ["nothing of that kind"] * rng.randint(0, 1)
        made.append((prediction, answers, float(exact), Fraction(2 * c, 2 * c + p + g)))
    return made


CONSTRUCTED = constructed(200 - len(BY_HAND))


def test_there_are_200_predictions() -> None:
    assert len(BY_HAND) == 60
    assert len(CONSTRUCTED) == 140
    assert len({expected for *_, expected in CONSTRUCTED}) > 15


@pytest.mark.parametrize("row", BY_HAND, ids=[repr(row[0]) for row in BY_HAND])
def test_scores_by_hand(row: tuple) -> None:
    prediction, answers, em, squad, hotpot, paper_em, paper = row
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(float(Fraction(squad)))
    assert hotpot_f1(prediction, answers) == pytest.approx(float(Fraction(hotpot)))
    assert paper_exact_match(prediction, answers) == paper_em
    assert paper_f1(prediction, answers) == pytest.approx(float(Fraction(paper)))


def test_scores_by_construction() -> None:
    for prediction, answers, em, expected in CONSTRUCTED:
        assert exact_match(prediction, answers) == em, prediction
        assert f1(prediction, answers) == pytest.approx(float(expected)), prediction
        assert hotpot_f1(prediction, answers) == pytest.approx(float(expected)), prediction
        # None of them has a full stop, a comma or a line end: the paper's evaluator cuts nothing.
        assert paper_f1(prediction, answers) == pytest.approx(float(expected)), prediction


@pytest.mark.parametrize(
    ("text", "direct", "reasoned"),
    [
        ("Paris. It is big.", "Paris", "Paris"),
        ("He was born in Rome, so the answer is Italy.", "He was born in Rome", "Italy"),
        ("so the answer is\nRome, Italy", "so the answer is", "Rome"),
        ("the answer is 7. Or the answer is 8.", "the answer is 7", "7"),
        ("The answer is 7.", "The answer is 7", "The answer is 7"),
        ("the answer is", "the answer is", ""),
        ("", "", ""),
    ],
)
def test_where_the_paper_cuts(text: str, direct: str, reasoned: str) -> None:
    assert paper_answer(text) == direct
    assert paper_answer(text, chain_of_thought=True) == reasoned


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was Anna Pavlova, in 1931.", ["Anna Pavlova"], 1.0),
        ("Pavlova, Anna", ["Anna Pavlova"], 0.0),
        ("category", ["cat"], 0.0),
        ("in 1931", ["x", "1931."], 1.0),
        ("anything", ["the"], 0.0),
    ],
)
def test_containment(prediction: str, answers: list[str], expected: float) -> None:
    assert contains_answer(prediction, answers) == expected


def test_normalization() -> None:
    assert normalize_answer("  The  an-swer,\tis: A Test! ") == "answer is test"
    assert normalize_answer("Cafe\u0301") == normalize_answer("caf\u00e9")


def test_recall() -> None:
    assert recall_at_k(["a", "b", "c"], {"c", "d"}, 3) == 0.5
    assert recall_at_k(["a", "b", "c"], {"c", "d"}, 2) == 0.0
    assert recall_at_k([], ["a"], 3) == 0.0
    assert recall_at_k(["a", "b"], ["b", "a", "a"], 2) == 1.0


def test_the_bootstrap_draws_passages() -> None:
    left, right = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    mean, low, high = paired_bootstrap(left, right, ["a", "a", "b", "b"])
    # Two passages: a draw is both a (1), both b (0) or one of each (0.5).
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert paired_bootstrap(left, right, ["a", "a", "b", "b"]) == (mean, low, high)
    steady = paired_bootstrap([0.6] * 40, [0.1] * 40, [i // 2 for i in range(40)])
    assert steady == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_is_that_of_theory() -> None:
    # 400 independent differences of ±1: the mean's standard error is 1/20, and the interval ±1.96 of it.
    rng = random.Random(3)
    differences = [rng.choice([-1.0, 1.0]) for _ in range(400)]
    mean, low, high = paired_bootstrap(differences, [0.0] * 400, range(400))
    spread = 1.96 * (1 - mean**2) ** 0.5 / 20
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.005)
