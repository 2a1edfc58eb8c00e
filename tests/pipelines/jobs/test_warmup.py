"""The warm-up trains on the right questions, its workers share one result, and a recipe can start from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.jobs.warmup import pairs_of_the_example
from pipelines.settings import describe
from prag_core.config_file import load_config
from prag_core.data.question_sets import read_questions
from prag_core.data.questions import Gold, Question
from prag_core.errors import AdapterError, InputError
from prag_core.evaluation.plan import EvaluationReply
from prag_core.llm.base_model import BaseModel
from prag_core.llm.lora import initial_factors
from prag_core.recipe import RECIPES
from prag_core.records import from_table
from prag_core.store.adapters import get_start
from prag_core.store.objects import Store
from prag_core.testing import tiny_base_model
from prag_core.training.examples import TrainingExample
from prag_core.training.trainer import Trainer
from prag_core.training.warmup import (
    WarmupSettings,
    asking_examples,
    train_warmup,
    warmup_examples,
    with_texts,
    without_overlap,
)
from tests.helpers.passages import make_augmentation, make_passage
from tests.helpers.published import publish_passages
from tests.helpers.workspace import Workspace

QUESTIONS = [Question(f"q{i}", f"Which number follows {i}?", (f"{i + 1}", "x")) for i in range(10)]
SETTINGS = WarmupSettings(learning_rate=1e-2, epochs=3, batch=4)


@pytest.fixture
def trainer(tiny_session: BaseModel):
    made = Trainer(tiny_session, replace(RECIPES["recall"], last_layers=2))
    yield made
    made.close()


def test_questions_that_are_asked_later_are_left_out() -> None:
    gold = (Gold(id="p1"),)
    questions = [*QUESTIONS[:3], Question("g", "Something else?", ("y",), gold=gold)]
    later = [Question("e1", "which number FOLLOWS 1", ("2",)), Question("e2", "Another?", ("z",), gold=gold)]
    left = without_overlap(questions, later, ["Which number follows the 2?"])
    assert [question.id for question in left] == ["q0"]
    with pytest.raises(InputError, match="none of the 1 questions"):
        without_overlap(questions[1:2], later)


def test_examples_have_the_prompt_of_the_recipe(trainer: Trainer) -> None:
    tokenizer = trainer.base.tokenizer
    texts = [tokenizer.decode(example.ids) for example in warmup_examples(trainer, QUESTIONS)]
    assert len(texts) == 10
    assert "Which number follows 3?" in texts[3]
    assert texts[3].endswith("The answer is 4." + tokenizer.eos_token)


def test_a_reader_has_its_passages_in_the_prompt_and_learns_only_the_answer(trainer: Trainer) -> None:
    gold = (Gold(title="Numbers", text="After 3 comes 4."), Gold(id="p", title="More", text="After 4 comes 5."))
    questions = with_texts([*QUESTIONS, replace(QUESTIONS[3], gold=gold), replace(QUESTIONS[4], gold=(Gold(id="p"),))])
    assert [question.gold for question in questions] == [gold]
    (example,) = warmup_examples(trainer, questions, reading=True)
    tokenizer = trainer.base.tokenizer
    prompt, answer = (tokenizer.decode(ids) for ids in _parted(example))
    assert "Numbers\nAfter 3 comes 4." in prompt
    assert "More\nAfter 4 comes 5." in prompt
    assert prompt.endswith("The answer is")
    assert answer == " 4." + tokenizer.eos_token
    with pytest.raises(InputError, match="none of the 10 questions has the text"):
        with_texts(QUESTIONS)


def _parted(example: TrainingExample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return example.ids[: example.scored_from], example.ids[example.scored_from :]


def test_it_learns_and_two_workers_give_the_result_of_one(trainer: Trainer) -> None:
    examples = warmup_examples(trainer, QUESTIONS)
    losses: list[float] = []
    alone = train_warmup(trainer, examples, SETTINGS, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == 9
    assert losses[-1] < losses[0]
    start = initial_factors(trainer.layout, SETTINGS.seed)
    assert all(not torch.equal(alone[name], start[name]) for name in start)
    # A worker sees only its share of the batch; the sum with the other worker is replayed from a recording.
    shares: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    one_step = replace(SETTINGS, epochs=1, batch=10)
    for rank in (0, 1):
        train_warmup(
            trainer, examples, one_step, rank=rank, workers=2, all_reduce=lambda t, r=rank: shares[r].append(t.clone())
        )
    others = iter(shares[1])
    both = train_warmup(trainer, examples, one_step, rank=0, workers=2, all_reduce=lambda t: t.add_(next(others)))
    whole = train_warmup(trainer, examples, one_step)
    for name, tensor in whole.items():
        # AdamW's first step is the sign of the gradient: where that is zero up to rounding, either is right.
        assert (torch.isclose(both[name], tensor, atol=1e-6)).float().mean() > 0.99


def test_a_warm_up_that_learns_nothing_is_no_warm_up(trainer: Trainer) -> None:
    examples = warmup_examples(trainer, QUESTIONS)
    with pytest.raises(AdapterError, match="changed nothing"):
        train_warmup(trainer, examples, replace(SETTINGS, learning_rate=1e-45))
    with pytest.raises(AdapterError, match="not finite"):
        train_warmup(trainer, examples, replace(SETTINGS, learning_rate=float("inf")))
    short = Trainer(trainer.base, replace(trainer.recipe, max_tokens=32))
    with pytest.raises(InputError, match="none of the 10 questions fits into 32 tokens"):
        warmup_examples(short, QUESTIONS)
    short.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_ray_train_gives_what_one_process_gives(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(2)]
    work = publish_passages(tmp_path, passages)
    lines = [{"id": q.id, "question": q.question, "answers": list(q.answers)} for q in QUESTIONS]
    known = make_augmentation(passages[0]).pairs[0].question
    lines.append({"id": "known", "question": known, "answers": ["thing"]})
    (tmp_path / "warm.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "later.jsonl").write_text(json.dumps(lines[0]))
    command = ["warmup", "-c", "config.yaml", "--json", "--exclude", "later.jsonl", "--workers", "2", "--epochs", "3"]
    command += ["--set", "model.dtype=float32"]  # as the model below, also on a CPU that computes in bf16
    made = json.loads(work.run(*command, "--learning-rate", "0.01", "--batch", "4", "--export", "peft", "warm.jsonl"))
    # One question is asked later, one is a question of an augmentation.
    assert (made["questions"], made["left_out"]) == (9, 2)
    assert made["last_loss"] < made["first_loss"]

    # The same in this process, by one worker.
    trainer = Trainer(tiny_base_model(tmp_path / "tiny"), RECIPES["recall"])
    questions = [q for q in read_questions(str(tmp_path / "warm.jsonl")) if q.id not in ("q0", "known")]
    expected = train_warmup(trainer, warmup_examples(trainer, questions), SETTINGS)
    got = get_start(Store(str(tmp_path / "store")), made["start"])
    for name, tensor in expected.items():
        assert torch.isclose(got[name], tensor, atol=2e-3).float().mean() > 0.98, name

    # A recipe that starts from its name and one that starts from the written folder are the same recipe.
    base = [f"model.name={tmp_path / 'tiny'}", f"store={tmp_path / 'store'}"]
    recipes = [
        describe(load_config(tmp_path / "config.yaml", [*base, *more]))[0]
        for more in ([], [f"train.initial_adapter={made['start']}"], [f"train.initial_adapter={tmp_path / 'peft'}"])
    ]
    assert [recipe.train.start for recipe in recipes] == ["", made["start"], made["start"]]
    assert recipes[0].fingerprint != recipes[1].fingerprint == recipes[2].fingerprint


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_reader_answers_with_the_adapters(tmp_path: Path) -> None:
    passages = [make_passage(n) for n in range(2)]
    work = publish_passages(tmp_path, passages)

    def paragraph(title: str, context: str, numbers: range) -> dict:
        asked = [
            {"id": f"{title} {n}", "question": f"What follows {n}?", "answers": [{"text": str(n)}]} for n in numbers
        ]
        return {"title": title, "paragraphs": [{"context": context, "qas": asked}]}

    known, other = passages[0], "Each number is followed by itself."
    read = {"data": [paragraph(known.title, known.text, range(3)), paragraph("Numbers", other, range(3, 9))]}
    (tmp_path / "squad.json").write_text(json.dumps(read))
    # The question that is asked later names the first passage by its id.
    later = {"question": "Will this be asked?", "answers": ["yes"], "gold_ids": [known.sources[0]]}
    (tmp_path / "later.jsonl").write_text(json.dumps(later))
    # Another set of questions that are asked later, one of which has the same id.
    more = {"question": "And this?", "answers": ["yes"], "gold_ids": [passages[1].sources[0]]}
    (tmp_path / "more.jsonl").write_text(json.dumps(more))
    command = ["warmup", "-c", "config.yaml", "--json", "--reading"]
    command += ["--exclude", "later.jsonl", "--exclude", "more.jsonl"]
    made = json.loads(work.run(*command, "--limit", "5", "--epochs", "3", "--learning-rate", "0.01", "squad.json"))
    assert (made["questions"], made["left_out"]) == (5, 4)
    assert made["last_loss"] < made["first_loss"]
    note = json.loads((tmp_path / "store" / "starts" / f"{made['start']}.json").read_text())
    assert note["settings"]["reading"] is True

    ask = ["ask", "-c", "config.yaml", "--json", "--compare", f"What is {known.title}?"]
    without, with_reader = (
        json.loads(work.run(*ask, *more)) for more in ([], ["--set", f"answer.reader={made['start']}"])
    )
    changed = [a["mode"] for a, b in zip(without, with_reader, strict=True) if a["text"] != b["text"]]
    assert set(changed) <= {"rag", "combine"}
    assert "combine" in changed

    # An evaluation also asks with the reader, and with the reader alone.
    asked = {"question": ask[-1], "answers": ["thing 0"], "gold_ids": [known.sources[0]]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked))
    command = ["evaluate", "-c", "config.yaml", "--dataset", "asked.jsonl", "--modes", "rag,combine"]
    command += ["--controls", "random", "--seeds", "1", "--set", f"answer.reader={made['start']}"]
    line = json.loads(work.run(*command).splitlines()[-1])
    assert list(line["f1"]) == ["rag", "combine", "random", "reader_rag"]
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["plan"]["reader"] == f"{made['start']} x0.4"
    store = Store(str(tmp_path / "store"))
    texts = [
        reply.text
        for reply in from_table(
            EvaluationReply, store.get_table(EvaluationReply, store.list("evaluations", ".parquet"))
        )
    ]
    told = {answer["mode"]: answer["text"] for answer in with_reader}
    assert len(texts) == 4
    assert {told["rag"], told["combine"]} <= set(texts)
    assert next(answer["text"] for answer in without if answer["mode"] == "rag") in texts

    refused = work.run(*ask, "--set", "answer.reader=nobody", code=2)
    assert "answer.reader = 'nobody'" in refused
    assert "prag warmup --reading" in refused


def test_a_writer_learns_from_passages_with_their_questions(trainer: Trainer) -> None:
    gold = (Gold(title="Numbers", text="After 3 comes 4. After 4 comes 5."),)
    questions = [replace(QUESTIONS[3], gold=gold), replace(QUESTIONS[4], gold=gold)]
    examples = asking_examples(trainer, questions)
    assert len(examples) == 6  # to ask and to read twice, and the answers of two sentences
    prompt, reply = (trainer.base.tokenizer.decode(ids) for ids in _parted(examples[0]))
    assert prompt == "Topic: Numbers\nSentence: After 3 comes 4.\nAnswer: 4\nQuestion:"
    assert reply == " Which number follows 3?" + trainer.base.tokenizer.eos_token
    with pytest.raises(InputError, match="a sentence of its passage holds"):
        asking_examples(trainer, [replace(QUESTIONS[7], gold=gold)])
    example = pairs_of_the_example()
    assert len(example) > 1000
    assert len(asking_examples(trainer, example)) > 2000


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_writer_writes_the_pairs_of_a_run(tmp_path: Path) -> None:
    work = Workspace(tmp_path, [make_passage(n) for n in range(2)])
    made = json.loads(work.run("warmup", "-c", "config.yaml", "--json", "--asking", "--limit", "4", "atlas"))
    assert made["questions"] == 4
    note = json.loads((tmp_path / "store" / "starts" / f"{made['start']}.json").read_text())
    assert (note["settings"]["asking"], note["recipe"]["rank"]) == (True, 8)

    wanted = {"strategy": "writer", "writer": made["start"], "generator": "transformers", "import_file": "null"}
    wanted["cloze"] = "true"
    settings = [part for key, value in wanted.items() for part in ("--set", f"augment.{key}={value}")]
    done = json.loads(work.run("run", "-c", "config.yaml", "--json", *settings))
    augmented = next(stage for stage in done["stages"] if stage["stage"] == "augment")
    # The tiny model writes nothing usable, so rules ask for the facts.
    assert (augmented["done"], augmented["rejected"]) == (2, {})
    (recipe,) = (tmp_path / "store" / "adapters").glob("*/recipe.json")
    assert json.loads(recipe.read_text())["recipe"]["augment"]["strategy"] == "writer"

    nobody = [setting.replace(made["start"], "nobody") for setting in settings]
    refused = work.run("run", "-c", "config.yaml", *nobody, code=2)
    assert "augment.writer = 'nobody'" in refused
    alone = work.run("run", "-c", "config.yaml", "--set", "augment.strategy=writer", *settings[4:], code=2)
    assert "there is no writer of this model" in alone
