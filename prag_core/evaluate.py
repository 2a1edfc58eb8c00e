"""How good an answer is, and how sure we may be of a difference.

Exact match and token F1 follow the SQuAD evaluation (Rajpurkar et al., 2016): lower case, no punctuation, no
articles, the best of the accepted answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower `text`, drop ASCII punctuation and English articles, fold white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals one of the answers after normalization, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1, over the answers, between the bags of words of prediction and answer."""
    return max(_f1(prediction, answer) for answer in answers)


def _f1(prediction: str, answer: str) -> float:
    found, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def paired_bootstrap(
    left: Sequence[float],
    right: Sequence[float],
    groups: Sequence[Hashable],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the mean of `left - right` and its 95 % interval, by drawing whole groups with replacement.

    Questions about one passage share its adapter, so the passage is what is drawn, not the question.
    """
    totals: dict[Hashable, list[float]] = {}
    for a, b, group in zip(left, right, groups, strict=True):
        totals.setdefault(group, []).append(a - b)
    sums = np.array([sum(values) for values in totals.values()])
    counts = np.array([len(values) for values in totals.values()])
    picks = np.random.default_rng(seed).integers(0, len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
