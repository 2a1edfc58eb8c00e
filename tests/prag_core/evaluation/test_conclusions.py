"""The sentences about an evaluation say what its intervals show, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from prag_core.evaluation.conclusions import conclusions
from tests.helpers.evaluations import report


def made(**differences: tuple[float, float, float]) -> dict[str, Any]:
    """A report with these differences of F1 (`left__right`: mean, low, high), and nothing odd."""
    found = [
        {"left": name.split("__")[0], "right": name.split("__")[1], "metric": "f1", "mean": m, "low": low, "high": high}
        for name, (m, low, high) in differences.items()
    ]
    return {"differences": found, "columns": {}, "retrieval": {"any": {}}, "plan": {"top_k": [3]}}


@pytest.mark.parametrize(
    ("differences", "holds", "text"),
    [
        (
            {"prag__closed": (0.49, 0.42, 0.56), "prag__wrong": (0.4, 0.3, 0.5), "prag__task": (0.45, 0.35, 0.5)},
            True,
            "The weights hold knowledge: prag is 0.49 [+0.42, +0.56] over the bare model, "
            "and 0.40 [+0.30, +0.50] over another passage's adapter.",
        ),
        ({"prag__closed": (0.49, 0.42, 0.56)}, True, "No control was asked"),
        (
            {"prag__closed": (0.3, 0.2, 0.4), "prag__task": (0.1, -0.05, 0.2)},
            None,
            "know their passage is not",
        ),
        ({"prag__closed": (0.02, -0.05, 0.09)}, None, "It is not shown that the weights hold knowledge"),
        ({"prag__closed": (-0.2, -0.3, -0.1)}, False, "make answers worse: prag is 0.20 [-0.30, -0.10] under"),
        ({"combine__rag": (0.1, 0.05, 0.2)}, True, "the adapters help: combine is 0.10 [+0.05, +0.20] over rag."),
        (
            {"combine__rag": (0.1, 0.05, 0.2), "combine__task_rag": (0.0, -0.1, 0.1)},
            None,
            "not shown to be better than an adapter trained on other passages",
        ),
        ({"combine__rag": (0.0, -0.1, 0.1)}, None, "not shown to help"),
        ({"combine__rag": (-0.2, -0.3, -0.1)}, False, "the adapters harm"),
    ],
)
def test_a_claim_is_made_only_where_its_interval_shows_it(
    differences: dict[str, tuple[float, float, float]], holds: bool | None, text: str
) -> None:
    (conclusion,) = conclusions(made(**differences))
    assert conclusion.holds is holds
    assert text in conclusion.text


def test_what_went_otherwise_than_planned_is_told() -> None:
    said = [conclusion.text for conclusion in conclusions(report())]
    assert "1 answer had a passage without an adapter, which was read from the prompt instead." in said
    assert "A gold passage is among the first 1 for 50% of the questions." in said
    failed = report()
    failed["columns"]["prag"]["failed"] = 2
    assert "2 answers of prag failed and count as wrong." in [conclusion.text for conclusion in conclusions(failed)]
