"""The mode `auto`: by what a search found, choose the mode in which a question is answered."""

from __future__ import annotations

from collections.abc import Sequence

from prag_core.records import Mode, Route


def choose(route: Route | None, scores: Sequence[float], trained: bool) -> tuple[Mode, str]:
    """Return the mode for a question, and why, in one sentence.

    The first rule that fits decides:

    1. Nothing was found, or the best score is below `closed_below`: `closed`.
    2. The best passage has no adapter: `rag`.
    3. The best score is at least `prag_score`, and the next one at most the share `prag_next` of it: `prag`.
    4. Else the mode `otherwise`.

    Args:
        route: The snapshot's thresholds. None if they were never fitted: then rule 1 closes only if nothing was found,
            and rules 3 and 4 give `combine`.
        scores: The scores of the passages, the best first.
        trained: Whether the best passage has an adapter.
    """
    unfitted = "" if route else "; no thresholds were fitted for this snapshot"
    if not scores:
        return "closed", f"closed: no passage was found{unfitted}"
    best = scores[0]
    found = f"the best passage scores {best:.1f}"
    if route and best < route.closed_below:
        return "closed", f"closed: {found}, below {route.closed_below:.1f}"
    if not trained:
        return "rag", f"rag: {found}, and has no adapter{unfitted}"
    if route is None:
        return "combine", f"combine: {found}, and has an adapter{unfitted}"
    lead = _lead(scores)
    if best >= route.prag_score and next_share(scores) <= route.prag_next:
        return "prag", f"prag: {found}, {lead}, and has an adapter"
    return route.otherwise, f"{route.otherwise}: {found}, {lead}: not clearly the best"


def next_share(scores: Sequence[float]) -> float:
    """Return the second score as a share of the best one: 0 if there is no second, 1 if the best is not above 0."""
    if len(scores) < 2:
        return 0.0
    return min(max(scores[1] / scores[0], 0.0), 1.0) if scores[0] > 0 else 1.0


def _lead(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return "no other was found"
    share = next_share(scores)
    return f"{1 / share:.1f} times the next one" if share > 0 else "and the next one nothing"
