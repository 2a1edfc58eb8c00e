"""Fits the thresholds of the mode `auto` to the answers of an evaluation, and says how well they do on other questions.

Each question was answered in every mode, so the answer of `auto` under any thresholds is known without asking again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prag_core.errors import InputError
from prag_core.evaluation.metrics import paired_bootstrap
from prag_core.evaluation.summary import STEPS, Evaluation
from prag_core.inference.route import choose
from prag_core.records import MODES, Mode, Route

# The most that the mean answer of `auto` may take, as a share of the time of `combine`.
TIME_SHARE = 0.7
FOLDS = 5
# A least score that no question reaches, however long it is and however large a corpus grows: `prag` is left to
# `otherwise`.
_NEVER = 1e9
_OTHERWISE: tuple[Literal["rag", "prag", "combine"], ...] = ("prag", "rag", "combine")
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """One question, as `auto` sees it and as each mode answers it.

    `milliseconds` are those of whole answers. All of them hold the search, which `auto` needs in any case.
    """

    scores: tuple[float, ...]  # of the retrieved passages, the best first
    trained: bool  # whether the best passage has an adapter
    group: Hashable  # questions about one passage share its adapter, so they stay in one fold
    f1: Mapping[Mode, float]
    milliseconds: Mapping[Mode, float]


@dataclass(frozen=True)
class AutoScore:
    """The mean F1 of a mode with its 95 % interval, and the mean time of an answer, also as a share of `combine`'s."""

    f1: float
    low: float
    high: float
    milliseconds: float
    time_share: float


@dataclass(frozen=True)
class AutoFit:
    """Fitted thresholds, and what `auto` reaches.

    `auto` and `chosen` are cross-validated: each question is answered under thresholds that were fitted to the others.
    `difference` is the F1 of `auto` over that of `best`, the single mode with the highest F1, with its 95 % interval.
    """

    route: Route
    n: int
    modes: Mapping[Mode, AutoScore]
    auto: AutoScore
    chosen: Mapping[Mode, float]  # the share of the questions that were answered in each mode
    best: Mode
    difference: tuple[float, float, float]
    most_time_share: float = TIME_SHARE
    folds: int = FOLDS


def observe(evaluation: Evaluation, trained: Callable[[str], bool]) -> list[Observation]:
    """Return the questions of an evaluation that were answered in each mode.

    `trained` says of a passage's key whether it has an adapter. With a reader, `rag` is the column that has it, as in
    service.
    """
    columns = {
        mode: "reader_rag" if mode == "rag" and "reader_rag" in evaluation.request_ids else mode for mode in MODES
    }
    f1 = {mode: evaluation.scores(name, "f1") for mode, name in columns.items()}
    observations = []
    for i, (group, keys, scores) in enumerate(
        zip(evaluation.groups, evaluation.retrieved, evaluation.hit_scores, strict=True)
    ):
        replies = {mode: evaluation.replies[evaluation.request_ids[name][i][0]] for mode, name in columns.items()}
        if any(reply.failed for reply in replies.values()):
            continue
        times = {
            mode: evaluation.retrieve_ms[i] + sum(getattr(reply, f"{step}_ms") for step in STEPS[1:])
            for mode, reply in replies.items()
        }
        has_adapter = bool(keys) and trained(keys[0])
        observations.append(Observation(scores, has_adapter, group, {mode: f1[mode][i] for mode in MODES}, times))
    return observations


def fit(observations: Sequence[Observation]) -> AutoFit:
    """Return the thresholds with the highest mean F1 whose mean answer takes at most `TIME_SHARE` of `combine`'s time.

    They are chosen from a grid: deciles of the best scores, tenths for the next one's share. Of equal ones the fastest
    is taken. The cross-validation repeats the choice without each fifth of the passages.

    Raises:
        InputError: when there are too few passages for the folds, or no thresholds are fast enough.
    """
    groups = [one.group for one in observations]
    if len(set(groups)) < FOLDS:
        raise InputError(
            f"thresholds of `auto` need answered questions about {FOLDS} passages or more, not {len(set(groups))}",
            "give more questions, or leave --fit-auto out",
        )
    routes = _grid([one.scores[0] for one in observations if one.scores])
    chosen = np.array([[MODES.index(choose(r, o.scores, o.trained)[0]) for o in observations] for r in routes])
    f1_by_mode = np.array([[one.f1[mode] for mode in MODES] for one in observations])
    ms_by_mode = np.array([[one.milliseconds[mode] for mode in MODES] for one in observations])
    # [routes, questions]: what each route gives and takes.
    places = np.arange(len(observations))
    f1, ms = f1_by_mode[places, chosen], ms_by_mode[places, chosen]
    combine_ms = ms_by_mode[:, MODES.index("combine")]
    # 1. The thresholds for service, from all questions.
    whole = _best(f1, ms, combine_ms)
    share = float(ms[whole].mean() / combine_ms.mean())
    if share > TIME_SHARE:
        raise InputError(
            f"no thresholds of `auto` take at most {TIME_SHARE:g} of combine's time: the fastest take {share:.2f}",
            "leave --fit-auto out, and name a mode",
        )
    # 2. What they are worth on questions about passages that they were not fitted to.
    folds = _folds(groups)
    used = np.empty(len(observations), int)
    for fold in range(FOLDS):
        inside = folds == fold
        used[inside] = _best(f1[:, ~inside], ms[:, ~inside], combine_ms[~inside])
    auto_f1, auto_ms, auto_modes = f1[used, places], ms[used, places], chosen[used, places]

    def score(values: _Floats, times: _Floats) -> AutoScore:
        mean, low, high = paired_bootstrap(values.tolist(), [0.0] * len(groups), groups)
        return AutoScore(mean, low, high, float(times.mean()), float(times.mean() / combine_ms.mean()))

    singles = {mode: score(f1_by_mode[:, i], ms_by_mode[:, i]) for i, mode in enumerate(MODES)}
    best = max(MODES, key=lambda mode: singles[mode].f1)
    return AutoFit(
        route=routes[whole],
        n=len(observations),
        modes=singles,
        auto=score(auto_f1, auto_ms),
        chosen={mode: float((auto_modes == i).mean()) for i, mode in enumerate(MODES)},
        best=best,
        difference=paired_bootstrap(auto_f1.tolist(), f1_by_mode[:, MODES.index(best)].tolist(), groups),
    )


def _grid(best_scores: Sequence[float]) -> list[Route]:
    """Return the routes to choose from. Only scores are looked at, no answers."""
    deciles = np.quantile(best_scores or [0.0], np.arange(0.1, 0.95, 0.1))
    scores = sorted({0.0, *(round(max(float(value), 0.0), 4) for value in deciles)})
    shares = [tenth / 10 for tenth in range(1, 11)]
    leads = [(_NEVER, 0.0), *((score, share) for score in scores for share in shares)]
    return [
        Route(closed_below=closed_below, prag_score=score, prag_next=share, otherwise=otherwise)
        for closed_below in scores
        for otherwise in _OTHERWISE
        # Where `otherwise` is `prag`, the rule before it decides nothing.
        for score, share in (leads[:1] if otherwise == "prag" else leads)
    ]


def _best(f1: _Floats, ms: _Floats, combine_ms: _Floats) -> int:
    """Return the position of the best route, from F1 and time `[routes, questions]`; the fastest if none is fast."""
    mean_f1, mean_ms = f1.mean(1), ms.mean(1)
    fast = mean_ms <= TIME_SHARE * combine_ms.mean()
    if not fast.any():
        return int(mean_ms.argmin())
    equal = np.flatnonzero(fast & (mean_f1 >= mean_f1[fast].max() - 1e-9))
    return int(equal[mean_ms[equal].argmin()])


def _folds(groups: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Return the fold of each question: the groups are dealt out at random, the same way each time."""
    order = list(dict.fromkeys(groups))
    random.Random(0).shuffle(order)
    dealt = {group: place % FOLDS for place, group in enumerate(order)}
    return np.array([dealt[group] for group in groups])
