"""Metrics of answers and retrieval, and confidence intervals of differences.

Exact match and token F1 follow the SQuAD evaluation (Rajpurkar et al., 2016): lower case, no punctuation, no
articles, and the best score over the accepted answers. HotpotQA's F1 differs in one rule (`hotpot_f1`). The
evaluation of the paper (Su et al., 2025) shortens the answer first (`paper_answer`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from prag_core.data.questions import normalize_answer

# HotpotQA compares these as a whole: "yes and no" gets no partial score.
_WHOLE = frozenset({"yes", "no", "noanswer"})
_CONCLUSION = "the answer is"
_STOPS = re.compile(r"[.,\n]")


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals one of the answers after normalization, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 over the answers, between the bags of words of prediction and answer.

    If prediction or answer has no words after normalization, F1 is 1.0 when both have none and else 0.0, as in SQuAD
    2.0.
    """
    return max(_f1(prediction, answer) for answer in answers)


def hotpot_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return F1 as HotpotQA defines it: yes and no only match as a whole, and an empty text scores 0."""

    def one(answer: str) -> float:
        found, wanted = normalize_answer(prediction), normalize_answer(answer)
        if not found or not wanted or (found != wanted and {found, wanted} & _WHOLE):
            return 0.0
        return _f1(prediction, answer)

    return max(one(answer) for answer in answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction contains the words of an accepted answer, in order and adjacent, else 0.0."""
    return float(any(contains(prediction, answer) for answer in answers))


def contains(text: str, answer: str) -> bool:
    """Whether `text` contains the words of `answer`, both normalized; no text contains an empty answer."""
    wanted = normalize_answer(answer)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(text)} "


def paper_answer(text: str, *, chain_of_thought: bool = False) -> str:
    """Return the part of an answer that the paper's evaluator compares: up to the first full stop, comma or line end.

    With chain of thought it begins after the first "the answer is".
    """
    if chain_of_thought and _CONCLUSION in text:
        text = text.split(_CONCLUSION, 1)[1]
    return _STOPS.split(text.strip(), maxsplit=1)[0].strip()


def paper_exact_match(prediction: str, answers: Sequence[str], *, chain_of_thought: bool = False) -> float:
    """Return the exact match of `paper_answer(prediction)`."""
    return exact_match(paper_answer(prediction, chain_of_thought=chain_of_thought), answers)


def paper_f1(prediction: str, answers: Sequence[str], *, chain_of_thought: bool = False) -> float:
    """Return HotpotQA's F1 of `paper_answer(prediction)`; the paper's evaluator uses it for every question set."""
    return hotpot_f1(paper_answer(prediction, chain_of_thought=chain_of_thought), answers)


def recall_at_k(found: Sequence[str], gold: Collection[str], k: int) -> float:
    """Return the share of the `gold` keys that are among the first `k` found."""
    return len(set(found[:k]) & set(gold)) / len(set(gold))


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
    """Return the mean of `left - right` and the bounds of its 95 % interval, by a paired bootstrap over groups.

    Questions about one passage share its adapter, so they are not independent: the bootstrap draws passages (the
    groups), not questions.

    `left`, `right` and `groups` have one score or group for each question.
    """
    totals: dict[Hashable, list[float]] = {}
    for a, b, group in zip(left, right, groups, strict=True):
        totals.setdefault(group, []).append(a - b)
    sums = np.array([sum(values) for values in totals.values()])
    counts = np.array([len(values) for values in totals.values()])
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    # In chunks: all draws of ten thousand groups at once would need a gigabyte.
    step = max(1, 10_000_000 // len(sums))
    for begin in range(0, draws, step):
        picks = generator.integers(0, len(sums), size=(min(step, draws - begin), len(sums)))
        means[begin : begin + step] = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
