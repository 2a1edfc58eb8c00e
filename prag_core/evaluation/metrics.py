"""How good an answer is, how good a retrieval is, and how sure we may be of a difference.

Exact match and token F1 follow the SQuAD evaluation (Rajpurkar et al., 2016): lower case, no punctuation, no
articles, the best of the accepted answers. HotpotQA's F1 differs from it in one rule, and the evaluation of the
paper (Su et al., 2025) cuts the answer before it compares.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from prag_core.data.questions import normalize_answer

# HotpotQA compares these as wholes: no part of "yes and no" is right.
_WHOLE = frozenset({"yes", "no", "noanswer"})
_CONCLUSION = "the answer is"
_STOPS = re.compile(r"[.,\n]")


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction equals one of the answers after normalization, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1, over the answers, between the bags of words of prediction and answer.

    Where one of the two has no words left, it is 1.0 if both have none, as in SQuAD 2.0.
    """
    return max(_f1(prediction, answer) for answer in answers)


def hotpot_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return F1 as HotpotQA defines it: a yes or no is right as a whole or not at all; no words, no points."""

    def one(answer: str) -> float:
        found, wanted = normalize_answer(prediction), normalize_answer(answer)
        if not found or not wanted or (found != wanted and {found, wanted} & _WHOLE):
            return 0.0
        return _f1(prediction, answer)

    return max(one(answer) for answer in answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the words of one of the answers stand in the prediction, in their order and side by side."""
    return float(any(contains(prediction, answer) for answer in answers))


def contains(text: str, answer: str) -> bool:
    """Whether the words of `answer` stand side by side in `text`, both normalized; no words are in no text."""
    wanted = normalize_answer(answer)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(text)} "


def paper_answer(text: str, *, chain_of_thought: bool = False) -> str:
    """Return what the paper's evaluator compares: the text up to its first full stop, comma or line end.

    With chain of thought, what stands before the first "the answer is" is left out.
    """
    if chain_of_thought and _CONCLUSION in text:
        text = text.split(_CONCLUSION, 1)[1]
    return _STOPS.split(text.strip(), maxsplit=1)[0].strip()


def paper_exact_match(prediction: str, answers: Sequence[str], *, chain_of_thought: bool = False) -> float:
    """Return the exact match of `paper_answer`."""
    return exact_match(paper_answer(prediction, chain_of_thought=chain_of_thought), answers)


def paper_f1(prediction: str, answers: Sequence[str], *, chain_of_thought: bool = False) -> float:
    """Return the F1 of `paper_answer`, by HotpotQA's definition, which the paper's evaluator uses for every set."""
    return hotpot_f1(paper_answer(prediction, chain_of_thought=chain_of_thought), answers)


def recall_at_k(found: Sequence[str], gold: Collection[str], k: int) -> float:
    """Return which share of the `gold` keys is among the first `k` of those found."""
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
    """Return the mean of `left - right` and its 95 % interval, by drawing whole groups with replacement.

    Questions about one passage share its adapter, so the passage is what is drawn, not the question.
    """
    totals: dict[Hashable, list[float]] = {}
    for a, b, group in zip(left, right, groups, strict=True):
        totals.setdefault(group, []).append(a - b)
    sums = np.array([sum(values) for values in totals.values()])
    counts = np.array([len(values) for values in totals.values()])
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    # In pieces: all draws of ten thousand groups at once would be a gigabyte.
    step = max(1, 10_000_000 // len(sums))
    for begin in range(0, draws, step):
        picks = generator.integers(0, len(sums), size=(min(step, draws - begin), len(sums)))
        means[begin : begin + step] = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
