"""Fitting `auto`: the known optimum is found, the time is kept, and the figures are of questions not fitted to."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from statistics import fmean

import pytest

from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.evaluation.auto import TIME_SHARE, Observation, fit, observe
from prag_core.evaluation.conclusions import auto_conclusion
from prag_core.evaluation.plan import EvaluationPlan, EvaluationReply, columns
from prag_core.evaluation.summary import Evaluation
from prag_core.inference.route import choose
from prag_core.records import MODES

TIMES = {"closed": 10.0, "rag": 14.0, "prag": 12.0, "combine": 22.0}
# What is found, whether it has an adapter, which mode alone is right, and how many such questions there are.
KINDS = [
    ((12.0, 3.0), True, "prag", 16),
    ((12.0, 11.0), True, "combine", 8),
    ((1.0, 0.9), True, "closed", 8),
    ((12.0, 3.0), False, "rag", 8),
]


def observations() -> list[Observation]:
    made = []
    for scores, trained, right, count in KINDS:
        f1 = {mode: float(mode == right) for mode in MODES}
        made += [Observation(scores, trained, f"{right}{n}", f1, TIMES) for n in range(count)]
    return made


def test_the_known_optimum_is_found() -> None:
    made = fit(observations())
    for scores, trained, right, _ in KINDS:
        assert choose(made.route, scores, trained)[0] == right
    assert made.n == 40
    assert (made.auto.f1, made.auto.low, made.auto.high) == (1.0, 1.0, 1.0)
    assert made.auto.milliseconds == pytest.approx((16 * 12 + 8 * 22 + 8 * 10 + 8 * 14) / 40)
    assert made.auto.time_share == pytest.approx(14 / 22)
    assert made.chosen == {"closed": 0.2, "rag": 0.2, "prag": 0.4, "combine": 0.2}
    assert {mode: score.f1 for mode, score in made.modes.items()} == made.chosen
    assert (made.best, made.difference[0]) == ("prag", pytest.approx(0.6))
    said = auto_conclusion(asdict(made))
    assert said.holds
    assert "0.60 [+0.4" in said.text
    assert "over prag, the best single mode, and takes 64% of combine's time" in said.text


def test_the_time_is_kept_where_the_slow_mode_is_right() -> None:
    """`combine` is always right. Its answers are given only as far as the time allows, to the least clear questions."""
    rows = [
        Observation((10.0, 0.1 * n), True, n, {"closed": 0.0, "rag": 0.0, "prag": 0.5, "combine": 1.0}, TIMES)
        for n in range(100)
    ]
    made = fit(rows)
    modes = [choose(made.route, row.scores, row.trained)[0] for row in rows]
    assert set(modes) == {"prag", "combine"}
    # In tenths, the most questions for `combine` that the time allows: 12 + 10 x <= 0.7 * 22.
    assert modes.count("combine") in (29, 30)
    assert sum(TIMES[mode] for mode in modes) / 100 <= TIME_SHARE * 22
    assert (made.best, made.difference[0] < 0) == ("combine", True)
    assert auto_conclusion(asdict(made)).holds is False


def chance(seed: int) -> list[Observation]:
    """Questions whose scores say nothing about which mode is right."""
    rng = random.Random(seed)
    rows = []
    for n in range(60):
        best = rng.uniform(1, 20)
        f1 = {mode: float(rng.random() < 0.5) for mode in MODES}
        rows.append(Observation((best, rng.uniform(0, best)), True, n, f1, TIMES))
    return rows


def test_the_figures_are_of_questions_about_other_passages() -> None:
    """Thresholds also fit chance, and nothing of that may be in the figures."""
    promised, told, told_of_twins = [], [], []
    for seed in range(2):
        rows = chance(seed)
        made = fit(rows)
        promised += [row.f1[choose(made.route, row.scores, row.trained)[0]] for row in rows]
        told.append(made.auto.f1)
        # A twin in another fold tells the answer. As a question about the same passage it is in the same one.
        apart = [*rows, *(replace(row, group=f"twin of {row.group}") for row in rows)]
        told_of_twins.append((fit([*rows, *rows]).auto.f1, fit(apart).auto.f1))
    together, apart_f1 = (fmean(values) for values in zip(*told_of_twins, strict=True))
    assert fmean(promised) > fmean(told) + 0.05
    assert apart_f1 > together + 0.03


def test_thresholds_that_save_no_time_are_refused() -> None:
    slow = [replace(row, milliseconds=dict.fromkeys(MODES, 20.0)) for row in observations()]
    with pytest.raises(InputError, match=r"at most 0\.7 of combine's time: the fastest take 1\.00"):
        fit(slow)


def test_the_same_answers_give_the_same_thresholds() -> None:
    assert fit(observations()) == fit(observations())


def asked(reader: str = "") -> Evaluation:
    """Three questions in each mode. The second finds nothing; the third fails in one mode."""
    plan = EvaluationPlan(reader=reader)
    wanted = columns(plan)
    replies = {
        f"{column.name}-{i}": EvaluationReply(
            f"{column.name}-{i}", f"{column.name} {i}", fetch_ms=1.0, prompt_ms=2.0, prefill_ms=30.0, decode_ms=place
        )
        for place, column in enumerate(wanted)
        for i in range(3)
    }
    replies["prag-2"] = EvaluationReply("prag-2", failed="too long")
    return Evaluation(
        origin={"snapshot": {"id": "x"}},
        plan=plan,
        questions=tuple(Question(f"q{i}", "Who?", ("prag 0", "reader_rag 0")) for i in range(3)),
        left_out={},
        columns=tuple(wanted),
        gold=(("a",), (), ("c",)),
        retrieved=(("a", "b"), (), ("c",)),
        retrieve_ms=(4.0, 5.0, 6.0),
        request_ids={column.name: [[f"{column.name}-{i}"] for i in range(3)] for column in wanted},
        replies=replies,
        hit_scores=((7.0, 2.0), (), (3.0,)),
    )


def test_what_a_question_tells() -> None:
    first, second = observe(asked(), lambda key: key == "a")
    assert (first.scores, first.trained, first.group) == ((7.0, 2.0), True, "a")
    assert (second.scores, second.trained) == ((), False)
    assert first.f1["prag"] == 1.0 > first.f1["closed"]
    # The search counts for each mode: `auto` searches before it can say `closed`.
    assert first.milliseconds == {"closed": 37.0, "rag": 38.0, "prag": 39.0, "combine": 40.0}
    assert not observe(asked(), lambda key: key == "b")[0].trained
    # In service, `rag` has the reader.
    assert first.f1["rag"] < observe(asked("name x0.4"), lambda key: True)[0].f1["rag"] == 1.0
