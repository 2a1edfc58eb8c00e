"""The mode `auto`: each rule at its boundary, and the record of thresholds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from prag_core.inference.route import choose, next_share
from prag_core.records import Route

ROUTE = Route(closed_below=4.0, prag_score=8.0, prag_next=0.5, otherwise="combine")


@pytest.mark.parametrize(
    ("scores", "trained", "mode"),
    [
        ((), False, "closed"),
        ((3.99,), True, "closed"),
        ((3.99,), False, "closed"),
        ((4.0,), False, "rag"),
        ((20.0, 1.0), False, "rag"),
        ((8.0, 4.0), True, "prag"),
        ((8.0,), True, "prag"),
        ((8.0, 4.01), True, "combine"),
        ((7.99, 1.0), True, "combine"),
        ((4.0,), True, "combine"),
    ],
)
def test_each_rule_at_its_boundary(scores: tuple[float, ...], trained: bool, mode: str) -> None:
    chosen, why = choose(ROUTE, scores, trained)
    assert chosen == mode
    assert why.startswith(f"{mode}: ")
    assert "fitted" not in why
    # Only the last rule asks what to do otherwise.
    for otherwise in ("rag", "prag"):
        other, _ = choose(replace(ROUTE, otherwise=otherwise), scores, trained)
        assert other == (otherwise if mode == "combine" else mode)


def test_it_says_why() -> None:
    assert choose(ROUTE, (11.2, 5.3), True)[1] == (
        "prag: the best passage scores 11.2, 2.1 times the next one, and has an adapter"
    )
    assert choose(ROUTE, (11.2, 0.0), True)[1].startswith(
        "prag: the best passage scores 11.2, and the next one nothing"
    )
    assert choose(ROUTE, (5.0,), True)[1] == (
        "combine: the best passage scores 5.0, no other was found: not clearly the best"
    )
    assert choose(ROUTE, (2.0, 1.0), True)[1] == "closed: the best passage scores 2.0, below 4.0"
    assert choose(ROUTE, (5.0, 1.0), False)[1] == "rag: the best passage scores 5.0, and has no adapter"


def test_without_thresholds_it_is_careful_and_says_so() -> None:
    said = [choose(None, *given) for given in (((), False), ((0.1,), True), ((99.0, 1.0), True), ((99.0,), False))]
    assert [mode for mode, _ in said] == ["closed", "combine", "combine", "rag"]
    assert all(why.endswith("no thresholds were fitted for this snapshot") for _, why in said)


def test_the_share_of_the_next_score() -> None:
    assert next_share((4.0, 1.0, 0.5)) == 0.25
    assert next_share((4.0,)) == 0.0
    assert next_share((4.0, -1.0)) == 0.0
    assert next_share((0.0, 0.0)) == next_share((-1.0, -2.0)) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"closed_below": -0.1},
        {"closed_below": math.nan},
        {"prag_score": math.inf},
        {"prag_next": 1.01},
        {"prag_next": math.nan},
        {"otherwise": "closed"},
    ],
)
def test_thresholds_out_of_range_are_refused(wrong: dict) -> None:
    (field,) = wrong
    with pytest.raises(ValueError, match=field):
        replace(ROUTE, **wrong)
