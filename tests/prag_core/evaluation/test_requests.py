"""What an evaluation asks: its columns, and the requests of each column and control."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prag_core.data.questions import Gold, Question
from prag_core.errors import InputError
from prag_core.evaluation.controls import ZERO_ADAPTER, random_name, task_name
from prag_core.evaluation.plan import EvaluationPlan, EvaluationRequest, columns
from prag_core.evaluation.requests import QuestionContext, make_request
from prag_core.records import MODES, Hit, Mode, Route, from_table, to_table
from tests.helpers.passages import make_augmentation, make_passage

PASSAGES = [make_passage(n) for n in range(8)]
KEYS = [passage.key for passage in PASSAGES]
QUESTION = Question("q0", "What is w5x3?", ("w5x3",), "kind", (Gold(id="p0"),))


def context(**changes) -> QuestionContext:
    plain = QuestionContext(
        ranked=tuple(Hit(PASSAGES[i], 9.0 - i) for i in (1, 0, 5, 3, 2)),
        gold=(PASSAGES[0],),
        trained=frozenset(KEYS[:6]),
        pool=KEYS[:6],
        augmentations={KEYS[1]: make_augmentation(PASSAGES[1])},
        tasks=("t0", "t1"),
    )
    return replace(plain, **changes)


def asked(column: str, seed: int = 0, plan: EvaluationPlan | None = None, **changes) -> EvaluationRequest:
    plan = plan or EvaluationPlan(controls=("wrong", "random", "task", "da"), top_k=(2, 1), weights=("sum", "mean"))
    chosen = next(c for c in columns(plan) if c.name == column)
    return make_request(QUESTION, chosen, seed, context(**changes), plan)


def keys(ask: EvaluationRequest) -> list[str]:
    return [hit.passage.key for hit in ask.hits]


@pytest.mark.parametrize(
    ("mode", "changes", "plan"),
    [
        ("prag", {}, {"route": Route(5.0, 9.0, 0.9, "combine")}),
        ("combine", {}, {"route": Route(5.0, 9.0, 0.8, "combine")}),
        ("combine", {}, {"route": None}),
        ("rag", {}, {"route": Route(5.0, 9.0, 0.8, "rag")}),
        ("closed", {}, {"route": Route(9.5, 9.0, 0.9, "combine")}),
        ("closed", {"ranked": ()}, {"route": None}),
        ("rag", {"trained": frozenset(KEYS[1:6])}, {"route": None}),
    ],
)
@pytest.mark.parametrize("reader", ["", "a reader x1"])
def test_auto_asks_as_the_mode_that_it_chooses(mode: Mode, changes: dict, plan: dict, reader: str) -> None:
    # The best passage scores 9, and the next one 8/9 of it.
    changes = {"ranked": tuple(Hit(PASSAGES[i], 9.0 - i) for i in range(3)), **changes}
    made = EvaluationPlan((*MODES, "auto"), strengths=(0.5,), reader=reader, **plan)
    chosen = "reader_rag" if mode == "rag" and reader else mode
    assert asked("auto", plan=made, **changes) == asked(chosen, plan=made, **changes)


def test_auto_has_one_column_and_needs_scores() -> None:
    plan = EvaluationPlan(("auto", "prag"), top_k=(3, 1), weights=("score", "sum"), strengths=(0.5, 1.0))
    assert [c.name for c in columns(plan)] == ["auto", "prag", "prag_k1", "prag_sum"]
    with pytest.raises(InputError, match="auto chooses by the scores of a search"):
        columns(replace(plan, retrieval="oracle", top_k=(1,)))


def test_columns() -> None:
    plan = EvaluationPlan(
        controls=("wrong", "random", "task", "da"),
        top_k=(3, 1),
        weights=("sum", "mean"),
        seeds=2,
        modes=("rag", "prag"),
    )
    named = {c.name: (c.mode, c.top_k, c.weights, len(c.seeds)) for c in columns(plan)}
    assert named == {
        "rag": ("rag", 3, "sum", 1),
        "prag": ("prag", 3, "sum", 1),
        "wrong": ("prag", 3, "sum", 1),
        "wrong_rag": ("combine", 3, "sum", 1),
        "random": ("prag", 3, "sum", 2),
        "task": ("prag", 3, "sum", 2),
        "task_rag": ("combine", 3, "sum", 2),
        "da_rag": ("rag", 3, "sum", 1),
        "rag_k1": ("rag", 1, "sum", 1),
        "prag_k1": ("prag", 1, "sum", 1),
        "prag_mean": ("prag", 3, "mean", 1),
    }
    strong = columns(EvaluationPlan(controls=("task",), top_k=(3, 1), strengths=(0.5, 1.0)))
    assert {c.name: c.strength for c in strong} == {
        "closed": 1.0,
        "rag": 1.0,
        "prag": 1.0,
        "combine": 0.5,
        "task": 1.0,
        "task_rag": 0.5,
        "rag_k1": 1.0,
        "prag_k1": 1.0,
        "combine_k1": 0.5,
        "combine_x1": 1.0,
    }
    read = columns(EvaluationPlan(modes=("combine",), controls=("wrong",), reader="ab x0.4"))
    assert [(c.name, c.mode, c.control) for c in read] == [
        ("combine", "combine", ""),
        ("wrong", "prag", "wrong"),
        ("wrong_rag", "combine", "wrong"),
        ("reader_rag", "rag", "reader"),
    ]
    assert len(columns(replace(plan, wrong="random"))[2].seeds) == 2
    with pytest.raises(InputError, match="top_k has no effect"):
        columns(replace(plan, retrieval="oracle"))


def test_the_modes_take_what_was_retrieved() -> None:
    assert asked("closed").hits == ()
    for name in ("rag", "prag", "combine"):
        assert (asked(name).mode, asked(name).hits) == (name, context().ranked[:2])
    assert asked("combine_k1").hits == context().ranked[:1]
    assert (asked("prag_mean").weights, asked("prag").weights) == ("mean", "sum")


def test_with_an_oracle_the_gold_passages_are_taken() -> None:
    plan = EvaluationPlan(retrieval="oracle", controls=("wrong",))
    assert asked("prag", plan=plan).hits == (Hit(PASSAGES[0], 1.0),)
    # The nearest one that is neither gold nor holds the answer.
    assert keys(asked("wrong", plan=plan)) == [KEYS[1]]


def test_a_wrong_passage_is_not_used_not_gold_and_holds_no_answer() -> None:
    # Retrieved are 1 and 0; 5 holds the answer; 3 and 2 are next.
    assert keys(asked("wrong")) == [KEYS[3], KEYS[2]]
    assert [hit.score for hit in asked("wrong").hits] == [8.0, 9.0]
    # The retrieved passages in the prompt, each with the adapter of a wrong one.
    beside = asked("wrong_rag")
    assert keys(beside) == keys(asked("wrong"))
    assert [hit.passage.text for hit in beside.hits] == [PASSAGES[1].text, PASSAGES[0].text]
    # One without an adapter would come into the prompt: it is passed over, and the pool fills up.
    few = asked("wrong", trained=frozenset({KEYS[2]}), pool=[KEYS[0], KEYS[1], KEYS[4]])
    assert keys(few) == [KEYS[2], KEYS[4]]
    with pytest.raises(InputError, match="only 1 other passages"):
        asked("wrong", trained=frozenset({KEYS[2]}), pool=[KEYS[0], KEYS[1]])


def test_a_random_wrong_passage_differs_by_seed() -> None:
    plan = EvaluationPlan(controls=("wrong",), wrong="random", top_k=(1,), seeds=5)
    drawn = [keys(asked("wrong", seed, plan))[0] for seed in range(5)]
    assert drawn == [keys(asked("wrong", seed, plan))[0] for seed in range(5)]
    assert len(set(drawn)) > 1
    assert not set(drawn) & {KEYS[0], KEYS[1]}


def test_controls_take_adapters_by_name() -> None:
    assert keys(asked("random", 1)) == [random_name(KEYS[1], 1), random_name(KEYS[0], 1)]
    assert keys(asked("random", trained=frozenset({KEYS[0]}))) == [random_name(KEYS[0], 0)]
    alone, together = asked("task", 1), asked("task_rag", 1)
    assert (alone.mode, together.mode) == ("prag", "combine")
    assert keys(alone) == keys(together) == [task_name("t1"), ZERO_ADAPTER]
    assert [hit.passage.text for hit in together.hits] == [PASSAGES[1].text, PASSAGES[0].text]
    mean = EvaluationPlan(controls=("task",), top_k=(2,), weights=("mean",))
    assert keys(asked("task", 0, mean)) == [task_name("t0")] * 2


def test_augmentations_go_into_the_prompt() -> None:
    ask = asked("da_rag")
    assert ask.mode == "rag"
    augmented, plain = (hit.passage.text for hit in ask.hits)
    assert plain == PASSAGES[0].text
    assert augmented.startswith(PASSAGES[1].text + "\n" + make_augmentation(PASSAGES[1]).rewrites[0])
    assert augmented.endswith("What is Quorl 1 number 2? Quorl 1 is thing 2.")


def test_a_request_id_depends_on_its_content() -> None:
    names = ["closed", "rag", "prag", "combine", "wrong", "wrong_rag", "random", "task", "task_rag", "da_rag"]
    names += ["prag_k1"]
    assert len({asked(name).id for name in names}) == len(names)
    assert asked("prag").id == asked("prag", ranked=(*context().ranked[:2], Hit(PASSAGES[7], 0.1))).id
    weak = asked("combine", plan=EvaluationPlan(top_k=(2,), strengths=(0.5,)))
    assert (weak.strength, weak.hits) == (0.5, asked("combine").hits)
    reading = EvaluationPlan(top_k=(2,), weights=("sum",), controls=("wrong",), reader="ab x0.4")
    assert asked("combine", plan=reading) == replace(asked("combine"), reader="ab x0.4")
    assert asked("combine", plan=reading).id != asked("combine").id
    # The column `rag` is the bare model, to compare with; the reader alone is a column of its own.
    assert asked("rag", plan=reading) == asked("rag")
    assert asked("reader_rag", plan=reading) == replace(asked("rag"), reader="ab x0.4")
    # A passage without an adapter is in the prompt in `prag`, too, and is read there as it is served.
    assert asked("prag", plan=reading) == replace(asked("prag"), reader="ab x0.4")
    assert weak.id != asked("combine").id
    again = from_table(EvaluationRequest, to_table(EvaluationRequest, [asked("da_rag")]))[0]
    assert again == asked("da_rag")
    assert again.id == asked("da_rag").id
