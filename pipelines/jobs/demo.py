"""The demo: run the main job on the example corpus, then ask its questions in every mode and with a control."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.jobs.run import run_job
from pipelines.words import counted
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.data.question_sets import COVERED, JSONL, UNCOVERED, read_questions
from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.evaluation.metrics import f1, paired_bootstrap
from prag_core.inference.engine import Engine, open_engine
from prag_core.inference.request import Request
from prag_core.packaged import local_path
from prag_core.records import MODES, Answer, Hit, Passage, from_table
from prag_core.store.objects import Store, open_store
from prag_core.store.snapshot import load_snapshot
from prag_core.store.tables import corpus_parts

# `wrong` is the control: the adapter of another passage. What it gains over `closed` is form, not knowledge.
COLUMNS = ("closed", "wrong", "prag", "rag", "combine")


def run_demo(config: Config, console: Console, progress_to: Console) -> dict[str, Any]:
    """Run the job, ask every question about its passages, print tables to `console`, and return the counts.

    Raises:
        InputError: when there is no `questions.jsonl` beside the corpus, or none of its questions is about a passage.
    """
    report = run_job(config, progress_to)
    begun = time.perf_counter()
    store = open_store(config)
    passages = _passages(store)
    questions = read_demo_questions(Path(local_path(config.corpus.path)).with_name("questions.jsonl"), passages)
    engine = open_engine(store, config)
    scores, answers = _ask_all(config, engine, questions, passages, console)
    seconds = {stage.stage: round(stage.seconds, 1) for stage in report.stages}
    seconds["ask"] = round(time.perf_counter() - begun, 1)
    file = config.augment.import_file
    imported = read_augmentations(file, config.storage) if file else None
    generated = {id for id, passage in passages.items() if imported is None or imported.find(passage) is None}
    _print_tables(console, questions, scores, generated)
    _print_examples(console, questions, answers, scores)
    return {
        "passages": report.stages[0].extra["passages"],
        "rejected": sum(report.rejected.values()),
        "adapters": report.adapters,
        "questions": len(questions),
        "f1": {column: round(fmean(scores[column]), 4) for column in COLUMNS},
        "seconds": seconds,
    }


def read_demo_questions(path: Path, passages: dict[str, Passage]) -> list[Question]:
    """Return the questions of a file that have a gold passage, and whose first one is a source id of `passages`.

    Raises:
        InputError: when the file cannot be read or has no such question.
    """
    questions = [q for q in read_questions(str(path), JSONL) if q.gold and q.gold[0].id in passages]
    if not questions:
        raise InputError(f"{path}: no question about a passage of the corpus", "use the example corpus")
    return questions


def _passages(store: Store) -> dict[str, Passage]:
    version = load_snapshot(store).corpus_version
    parts = corpus_parts(store, version)
    rows = from_table(Passage, store.get_table(Passage, parts))
    return {source: passage for passage in rows for source in passage.sources}


def _ask_all(
    config: Config, engine: Engine, questions: Sequence[Question], passages: dict[str, Passage], console: Console
) -> tuple[dict[str, list[float]], dict[str, list[Answer]]]:
    ids = sorted(passages)
    answers: dict[str, list[Answer]] = {}
    for column in COLUMNS:
        console.print(f"asking {counted(len(questions), 'question')}: {column}")
        requests = []
        for question in questions:
            if column == "wrong":
                other = passages[ids[(ids.index(question.gold[0].id) + 1) % len(ids)]]
                requests.append(Request(question.question, "prag", hits=(Hit(other, 1.0),)))
            else:
                mode = next(mode for mode in MODES if mode == column)
                requests.append(Request(question.question, mode, config.answer.top_k, config.answer.weights))
        answers[column] = engine.answer_batch(requests)
    scores = {
        column: [f1(a.text, q.answers) for a, q in zip(answers[column], questions, strict=True)] for column in COLUMNS
    }
    return scores, answers


def _print_tables(
    console: Console, questions: Sequence[Question], scores: dict[str, list[float]], generated: set[str]
) -> None:
    groups = {
        "all": [True] * len(questions),
        COVERED: [q.type == COVERED for q in questions],
        UNCOVERED: [q.type == UNCOVERED for q in questions],
        "augmented by the model itself": [q.gold[0].id in generated for q in questions],
    }
    table = Table(title="F1 (own answer against the accepted answers)")
    for name in ("questions", "n", *COLUMNS):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for name, chosen in groups.items():
        picked = {c: [s for s, use in zip(scores[c], chosen, strict=True) if use] for c in COLUMNS}
        if any(chosen):
            table.add_row(name, str(sum(chosen)), *(f"{fmean(picked[c]):.3f}" for c in COLUMNS))
    console.print(table)
    table = Table(title="Differences, 95 % bootstrap interval by passage")
    for name in ("difference", "F1", "interval"):
        table.add_column(name)
    by_passage = [question.gold[0].id for question in questions]
    for left, right in (("prag", "closed"), ("prag", "wrong"), ("combine", "rag")):
        mean, low, high = paired_bootstrap(scores[left], scores[right], by_passage)
        table.add_row(f"{left} − {right}", f"{mean:+.3f}", f"{low:+.3f} … {high:+.3f}")
    console.print(table)


def _print_examples(
    console: Console, questions: Sequence[Question], answers: dict[str, list[Answer]], scores: dict[str, list[float]]
) -> None:
    """Print the answers to three questions about different passages: those for which the adapters helped most."""
    gain = [after - before for after, before in zip(scores["prag"], scores["closed"], strict=True)]
    shown: set[str] = set()
    for i in sorted(range(len(questions)), key=lambda i: -gain[i]):
        passage = questions[i].gold[0].id
        if len(shown) == 3 or passage in shown:
            continue
        shown.add(passage)
        table = Table(title=questions[i].question, caption=f"accepted: {', '.join(questions[i].answers)}")
        for column in COLUMNS:
            table.add_column(column)
        table.add_row(*(answers[column][i].text for column in COLUMNS))
        console.print(table)
