"""What an evaluation asks, its controls, its summary and its page; the whole of it on Ray, killed in the middle."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines.evaluation.report import html_page, print_report, write_report
from prag_core.data.questions import Gold, Question
from prag_core.errors import InputError
from prag_core.evaluation.controls import (
    NOTHING,
    ControlSource,
    random_like,
    random_name,
    task_job,
    task_name,
    task_sets,
)
from prag_core.evaluation.plan import (
    Column,
    EvaluationPlan,
    EvaluationRequest,
    QuestionContext,
    columns,
    make_request,
)
from prag_core.evaluation.summary import summarize, summary_line
from prag_core.llm.layout import LoraLayout
from prag_core.records import Hit, from_table, to_table
from prag_core.training.examples import TrainingExample
from tests.helpers.adapters import random_adapter
from tests.helpers.evaluations import evaluation, replies
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.published import publish_passages

PASSAGES = [make_passage(n) for n in range(8)]
KEYS = [passage.key for passage in PASSAGES]
LAYOUT = LoraLayout(rank=2, scale=16.0, layers=(0, 3), targets=("up", "down"), shapes=((6, 10), (10, 6)))
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


# ---- what is asked


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
        ("reader_rag", "combine", "reader"),
    ]
    assert len(columns(replace(plan, wrong="random"))[2].seeds) == 2
    with pytest.raises(InputError, match="several values of top_k"):
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
    assert keys(alone) == keys(together) == [task_name("t1"), NOTHING]
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


def test_a_request_is_named_by_its_content() -> None:
    names = ["closed", "rag", "prag", "combine", "wrong", "random", "task", "task_rag", "da_rag", "prag_k1"]
    assert len({asked(name).id for name in names}) == len(names)
    assert asked("prag").id == asked("prag", ranked=(*context().ranked[:2], Hit(PASSAGES[7], 0.1))).id
    weak = asked("combine", plan=EvaluationPlan(top_k=(2,), strengths=(0.5,)))
    assert (weak.strength, weak.hits) == (0.5, asked("combine").hits)
    reading = EvaluationPlan(top_k=(2,), controls=("wrong",), reader="ab x0.4")
    assert asked("combine", plan=reading) == replace(asked("combine"), reader="ab x0.4")
    assert asked("combine", plan=reading).id != asked("combine").id
    assert asked("prag", plan=reading).id == asked("prag").id
    # The reader alone: the passages in the prompt, and nothing of them in the weights.
    alone = asked("reader_rag", plan=reading)
    assert (alone.reader, keys(alone)) == ("ab x0.4", [NOTHING, NOTHING])
    assert [hit.passage.text for hit in alone.hits] == [hit.passage.text for hit in asked("combine").hits]
    assert weak.id != asked("combine").id
    again = from_table(EvaluationRequest, to_table(EvaluationRequest, [asked("da_rag")]))[0]
    assert again == asked("da_rag")
    assert again.id == asked("da_rag").id


# ---- controls


def test_a_random_adapter_has_the_norm_of_the_right_one_in_each_module() -> None:
    right = random_adapter(LAYOUT, 3)
    made = random_like(right, LAYOUT, 0, "k")
    for target in LAYOUT.targets:
        wanted, got = (f[f"{target}.B"] @ f[f"{target}.A"] for f in (right, made))
        assert torch.allclose(wanted.norm(dim=(1, 2)), got.norm(dim=(1, 2)), rtol=1e-4)
        cosine = (wanted * got).sum() / wanted.norm() / got.norm()
        assert abs(cosine) < 0.7
    assert all(
        torch.equal(a, b) for a, b in zip(made.values(), random_like(right, LAYOUT, 0, "k").values(), strict=True)
    )
    other = random_like(right, LAYOUT, 1, "k")
    assert not torch.equal(made["up.A"], other["up.A"])
    # The start of training, B = 0, changes nothing: nor does its random double.
    still = {name: tensor * (name[-1] == "A") for name, tensor in right.items()}
    assert not random_like(still, LAYOUT, 0, "k")["up.B"].any()


def test_controls_are_adapters_like_any_other() -> None:
    class Own:
        def get(self, key: str):
            return random_adapter(LAYOUT, int(key))

    reads = []

    def task(name: str):
        reads.append(name)
        return random_adapter(LAYOUT, 9)

    source = ControlSource(Own(), LAYOUT, task)
    assert torch.equal(source.get("4")["up.A"], random_adapter(LAYOUT, 4)["up.A"])
    expected = random_like(random_adapter(LAYOUT, 4), LAYOUT, 2, "4")
    assert torch.equal(source.get(random_name("4", 2))["up.A"], expected["up.A"])
    assert source.get(task_name("t")) is source.get(task_name("t"))
    assert reads == ["t"]
    assert not any(tensor.any() for tensor in source.get(NOTHING).values())


def test_no_question_is_answered_by_a_task_adapter_of_its_own_passages() -> None:
    pool = [f"k{i}" for i in range(12)]
    # Enough passages that no question is about: one set for all.
    sets, numbers = task_sets(pool, [{"k0"}, {"k1", "x"}], 5, seed=0)
    assert len(sets) == 1
    assert len(sets[0]) == 5
    assert numbers == [0, 0]
    assert not set(sets[0]) & {"k0", "k1"}
    assert task_sets(pool, [{"k0"}], 5, seed=1)[0] != sets
    # Every passage is asked about.
    related = [{pool[i], pool[(i * 5 + 1) % 12]} for i in range(12)]
    sets, numbers = task_sets(pool, related, 8, seed=0)
    assert sorted(key for keys in sets for key in keys) == sorted(pool)
    assert all(not set(sets[number]) & of for number, of in zip(numbers, related, strict=True))
    with pytest.raises(InputError, match="needs 3 passages"):
        task_sets(pool[:2], [set(pool[:2])], 8, seed=0)


def test_a_task_adapter_trains_as_many_steps_as_one_adapter() -> None:
    passages = [[TrainingExample((passage, step)) for step in range(4)] for passage in range(3)]
    job = task_job("t", passages, rounds=1)
    assert [example.ids for example in job.examples] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    twice = [example.ids for example in task_job("t", passages, rounds=2).examples]
    assert twice == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 0), (2, 1), (0, 2), (1, 3)]


def report() -> dict:
    return summarize(evaluation(), {"name": "invented", "questions": 6}, "prag evaluate --dataset invented")


def test_the_summary() -> None:
    made = report()
    assert (made["dataset"]["asked"], made["dataset"]["left_out"]) == (4, {"no_gold": 2})
    prag, closed, drawn = (made["columns"][name] for name in ("prag", "closed", "random"))
    assert (prag["f1"], prag["em"], prag["contains"]) == (0.75, 0.75, 0.75)
    assert closed["f1"] == pytest.approx((1 + 2 / 3) / 4, abs=1e-4)
    assert drawn["f1"] == 0.5 / 4  # the mean of two draws
    assert prag["milliseconds"]["total"] == 5.0 + 1.0 + 0.5 + 2.0 + 30.0 + 60.0
    assert closed["milliseconds"]["retrieve"] == 0.0
    assert (prag["without_adapter"], closed["without_adapter"], prag["failed"]) == (1, 0, 0)
    # Two passages: F1 1 (a: 1, 1) and 0.5 (b: 1, 0).
    assert prag["f1_interval"] == [0.5, 1.0]
    difference = next(d for d in made["differences"] if (d["right"], d["metric"]) == ("closed", "f1"))
    # By question 0, 1, 1, -2/3; by passage 0.5 and 1/6.
    assert difference["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert (difference["low"], difference["high"]) == (pytest.approx(1 / 6, abs=1e-4), 0.5)
    # The fourth question's adapter was cut short: without it 0, 1, 1.
    kept = made["with_adapters"]
    assert (kept["n"], kept["f1"]) == (3, {"closed": 0.3333, "prag": 1.0, "random": 0.1667})
    difference = next(d for d in kept["differences"] if (d["right"], d["metric"]) == ("closed", "f1"))
    assert (difference["mean"], difference["low"], difference["high"]) == (0.6667, 0.5, 1.0)
    assert made["types"]["odd"]["f1"]["prag"] == 0.5
    assert made["types"]["even"] == {"n": 2, "f1": {"closed": 0.5, "prag": 1.0, "random": 0.25}}
    assert made["retrieval"]["recall"] == {"1": 0.375, "3": 0.625, "5": 0.625}
    assert made["retrieval"]["any"]["1"] == 0.5
    (examples,) = made["examples"]
    assert [e["question"] for e in examples["won"]] == ["Question 1 <b>?", "Question 2 <b>?"]
    assert [e["texts"]["closed"] for e in examples["lost"]] == ["answer"]


def test_the_last_line() -> None:
    line = summary_line(report())
    assert line["n"] == 4
    assert line["f1"] == {"closed": 0.4167, "prag": 0.75, "random": 0.125}
    assert line["delta"] == {"prag_closed": 0.3333, "prag_random": 0.625}
    assert line["ci"]["prag_closed"] == [0.1667, 0.5]


def test_chain_of_thought_is_cut_as_the_paper_does() -> None:
    plain = evaluation()
    reasoned = {
        id: replace(reply, reasoning=f"It is known, so the answer is {reply.text}, surely.")
        for id, reply in plain.replies.items()
    }
    made = summarize(replace(plain, replies=reasoned), {"name": "x"}, "")
    assert made["columns"]["prag"]["paper_f1"] == 0.75


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_self_contained_and_always_the_same(tmp_path: Path) -> None:
    made = report()
    page = html_page(made)
    assert page == html_page(json.loads(json.dumps(made)))
    parsed = _Page()
    parsed.feed(page)
    assert parsed.names.count("svg") == 3  # modes, latency, types; one k draws no curve
    assert {link for link in parsed.links if not link.startswith("#")} == set()
    assert "Question 1 &lt;b&gt;?" in page
    for told in ("20260101T000000-ab", "small ab", "prag evaluate --dataset invented", "random"):
        assert told in page
    row = "<td>prag − closed</td><td>+0.333</td><td>+0.167 … +0.500</td><td>+0.667</td><td>+0.500 … +1.000</td>"
    assert row in page
    assert "each passage has an adapter" in page
    whole = replace(evaluation(), replies={id: replace(r, notes=()) for id, r in evaluation().replies.items()})
    assert "with an adapter" not in html_page(summarize(whole, {"name": "x"}, ""))
    assert not re.search(r"url\((?!#)", page)
    write_report(made, tmp_path / "deep" / "report")
    assert json.loads((tmp_path / "deep" / "report" / "report.json").read_text(encoding="utf-8")) == made


def test_a_log_gets_whole_numbers() -> None:
    made = report()
    made["columns"] |= {f"combine_mean_{i}": made["columns"]["prag"] for i in range(9)}
    for kind in made["types"].values():
        kind["f1"] |= dict.fromkeys(made["columns"], 0.5)
    made["with_adapters"]["f1"] |= dict.fromkeys(made["columns"], 0.5)
    log = io.StringIO()
    print_report(made, Console(file=log))
    lines = log.getvalue().splitlines()
    assert not [line for line in lines if re.search(r"\S…", line)]
    (row,) = [line.split() for line in lines if "combine_mean_8" in line and line.count("0.500") == 3]
    assert row[1] == "combine_mean_8"


def test_f1_against_k_is_drawn() -> None:
    plain = evaluation()
    more = Column("prag_k3", "prag", 3, "sum")
    both = replace(plain, columns=(*plain.columns, more), asks={**plain.asks, "prag_k3": plain.asks["prag"]})
    assert html_page(summarize(both, {"name": "x"}, "")).count("<svg") == 4


# ---- on Ray


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(tmp_path: Path) -> None:
    work = publish_passages(tmp_path, [make_passage(n) for n in range(6)])
    lines = [
        {
            "id": f"q{i}{j}",
            "question": f"What is part {'abcd'[j]} of Quorl {i}?",
            "answers": [f"thing {j}"],
            "passage_id": f"p{i}",
        }
        for i in range(6)
        for j in range(4)
    ]
    lines.append({"id": "elsewhere", "question": "Who?", "answers": ["x"], "passage_id": "p77"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", "-c", "config.yaml", "--dataset", "questions.jsonl", "--top-k", "1", "--seeds", "1"]
    command += [
        "--set",
        "answer.batch_size=8",
        "--set",
        "answer.max_new_tokens=8",
        "--controls",
        "wrong,random,task,da",
    ]

    # 1. Killed as soon as something was answered.
    process = work.start(*command)
    parts = tmp_path / "store" / "evaluations"
    deadline = time.monotonic() + 240
    while not list(parts.glob("*/replies/*.parquet")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # what its workers were writing when they noticed
    before = replies(tmp_path)
    assert 0 < len(before) < 24 * 9
    tasks = {path: path.stat().st_mtime_ns for path in parts.glob("*/tasks/*.safetensors")}
    assert len(tasks) == 2  # each question has one passage of its own: one of two sets has it not

    # 2. Again: what was answered is kept, the rest is asked once.
    out = work.run(*command)
    after = replies(tmp_path)
    assert [reply for reply in after if reply.id in {r.id for r in before}] == before
    assert len({reply.id for reply in after}) == len(after) == 24 * 9
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*/tasks/*.safetensors")} == tasks
    line = json.loads(out.strip().splitlines()[-1])
    assert line["n"] == 24
    names = ["closed", "rag", "prag", "combine", "wrong", "random", "task", "task_rag", "da_rag"]
    assert list(line["f1"]) == names
    made = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert made["dataset"]["left_out"] == {"not_in_corpus": 1}
    assert made["retrieval"]["recall"]["1"] == 1.0
    assert all(column["without_adapter"] == column["failed"] == 0 for column in made["columns"].values())
    assert made["command"].startswith("prag evaluate -c config.yaml")
    assert asdict(EvaluationPlan())["modes"] == tuple(made["plan"]["modes"])
    assert made["columns"]["da_rag"]["prompt_tokens"] > made["columns"]["rag"]["prompt_tokens"]
