"""The paper's experiment runs from published files to a table, here on invented content and with a tiny model."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prag_core.config import train_recipe
from prag_core.config_file import load_config
from prag_core.data.question_sets import FORMATS
from prag_core.errors import InputError
from prag_core.recipe import RECIPES
from prag_core.store.adapters import open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot
from prag_core.testing import write_tiny_model

PAPER = Path(__file__).parents[2] / "examples" / "paper"
CONFIGS = sorted(PAPER.glob("*.yaml"))
TABLE = runpy.run_path(str(PAPER / "table.py"))
# Of the paper's F1, the means over its four sets: standard RAG, P-RAG, both.
MEANS = {
    "llama-3.2-1b": (0.269, 0.261, 0.325),
    "qwen2.5-1.5b": (0.208, 0.259, 0.283),
    "llama-3-8b": (0.270, 0.361, 0.415),
}
HILLS = [f"Mount {name}" for name in ("Arvel", "Brosk", "Cindra", "Dovan", "Esk", "Fenra", "Gallo", "Hask")]


def text_of(number: int) -> str:
    hill = HILLS[number]
    return f"{hill} is a hill in Vendland. It is {410 + number} metres high and was first climbed in {1801 + number}."


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_the_papers(file: Path) -> None:
    config = load_config(file)
    assert train_recipe(config.train) == RECIPES["paper"]
    assert (config.augment.strategy, config.augment.pairs, config.augment.cloze) == ("paper", 3, False)
    assert (config.answer.top_k, config.answer.weights, config.answer.combine_strength) == (3, "sum", 1)
    assert file.stem in MEANS


def test_the_sets_are_those_that_can_be_read() -> None:
    run = runpy.run_path(str(PAPER / "run.py"))
    assert set(run["SETS"]) == {name.partition(".")[0] for name in TABLE["COLUMNS"]} <= set(FORMATS)
    assert {name.rpartition("/")[2] for name in run["EPOCHS"]} <= set(run["SETS"])
    assert {name.partition("/")[0] for name in run["EPOCHS"] if "/" in name} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize("name", MEANS)
def test_the_papers_figures_have_the_means_that_are_known_of_them(name: str) -> None:
    printed = TABLE["table"](name, {}, {})
    found = [re.search(rf"^\| {title}, paper \|.* (\S+) \|$", printed, re.MULTILINE) for title in MODE_TITLES]
    assert tuple(float(row.group(1)) for row in found if row) == MEANS[name]
    # Tables 2 and 3 compare with the P-RAG of Table 1, for the same models.
    assert all(other.rsplit("-by-")[0].removesuffix("-warm") in MEANS for other in TABLE["TABLES_2_AND_3"])


MODE_TITLES = [TABLE["MODES"][mode] for mode in ("rag", "prag", "combine")]


def published_files(folder: Path) -> dict[str, str]:
    """Write the corpus, the four sets and the augmentations in the forms in which they are published."""
    with gzip.open(folder / "psgs_w100.tsv.gz", "wt", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "text", "title"])
        rows.writerows([number + 1, text_of(number), hill] for number, hill in enumerate(HILLS))
        rows.writerow([len(HILLS) + 1, "Nobody asks for the river Ohl.", "Ohl"])

    def multi_hop(number: int, kind: str) -> dict[str, Any]:
        first, second = HILLS[number], HILLS[number + 1]
        facts = [[first, 1], [second, 1]]
        context = [[HILLS[n], [f"{part}." for part in text_of(n).split(". ")]] for n in (number, number + 1)]
        question = f"Which hill is higher, {first} or {second}?"
        record = {"_id": f"q{number}", "type": kind, "question": question, "answer": second}
        return {**record, "context": context, "supporting_facts": facts, "answer_id": None, "evidences": []}

    kinds = ("comparison", "bridge_comparison", "comparison", "comparison")
    sets: dict[str, Any] = {
        "2wikimultihopqa": [multi_hop(number, kind) for number, kind in enumerate(kinds)],
        "hotpotqa": [
            {
                key: value
                for key, value in multi_hop(number, "comparison").items()
                if key not in ("answer_id", "evidences")
            }
            for number in (4, 5)
        ],
        "cwq": [{"ID": "c0", "question": "How high is Mount Esk?", "answers": [{"answer": "414", "aliases": []}]}],
    }
    files = {}
    for name, records in sets.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(records))
        files[name] = str(file)
    with (folder / "popQA.tsv").open("w", newline="") as stream:
        rows = csv.writer(stream, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "prop", "obj", "s_wiki_title", "question", "possible_answers"])
        for number in (0, 1, 2):
            year = str(1801 + number)
            question = f"In what year was {HILLS[number]} first climbed?"
            rows.writerow([number, "first ascent", year, HILLS[number], question, json.dumps([year])])
    augment = []
    for number, hill in enumerate(HILLS):
        qa = [
            (f"How high is {hill}?", f"{410 + number} metres", f"{hill} is {410 + number} metres high."),
            (f"When was {hill} first climbed?", f"{1801 + number}", f"{hill} was first climbed in {1801 + number}."),
            (f"Where is {hill}?", "Vendland", f"{hill} is in Vendland."),
        ]
        pairs = [dict(zip(("question", "answer", "full_answer"), pair, strict=True)) for pair in qa]
        rewrite = f"In Vendland stands {hill}."
        augment.append({"pid": 0, "passage": text_of(number), "tiny_rewrite": rewrite, "tiny_qa": pairs})
    (folder / "augmentations.json").write_text(json.dumps([{"test_id": 0, "augment": augment}]))
    return {**files, "popqa": str(folder / "popQA.tsv")}


def run_script(name: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, str(PAPER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_index_is_used_only_for_the_corpus_that_it_was_built_from(tmp_path: Path) -> None:
    """A trial on a small corpus would else decide what is retrieved when Wikipedia is asked for."""
    prepare = runpy.run_path(str(PAPER / "prepare.py"))
    published_files(tmp_path)
    (tmp_path / "small.jsonl").write_text(json.dumps({"id": "small", "text": text_of(0)}) + "\n")
    small, whole = (
        load_config(CONFIGS[0], [f"corpus.path={tmp_path / name}"]) for name in ("small.jsonl", "psgs_w100.tsv.gz")
    )
    for _ in range(2):  # the second time it is there
        retriever = prepare["open_corpus"](small, tmp_path / "data" / "index")
        assert [hit.passage.sources for hit in retriever.search("Mount Arvel", 2)] == [("small",)]
        retriever.close()
    with pytest.raises(InputError, match="index of another corpus"):
        prepare["open_corpus"](whole, tmp_path / "data" / "index")


def test_a_stop_ends_the_command_under_way_and_then_the_script(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    os.mkfifo(config)
    command = [sys.executable, str(PAPER / "run.py"), str(config), "--sets", "popqa"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with config.open("w"):  # `prag run` waits in it for its configuration
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Run the same command again to continue" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_from_published_files_to_the_table(tmp_path: Path, ray_here: str) -> None:
    files = published_files(tmp_path)
    config = PAPER / "llama-3.2-1b.yaml"
    corpus = f"corpus.path={tmp_path / 'psgs_w100.tsv.gz'}"
    prepare = ["-c", config, "--set", corpus, "--set", "answer.top_k=2", "--questions", 2, "--to", tmp_path / "data"]
    printed = run_script("prepare.py", *prepare, *(f"{name}:{file}" for name, file in files.items()))
    assert "2wikimultihopqa: 3 questions (total 2, comparison 2, bridge_comparison 1)" in printed
    assert "popqa: 2 questions (total 2)" in printed
    lines = (tmp_path / "data" / "2wikimultihopqa" / "corpus.jsonl").read_text().splitlines()
    titles = {json.loads(line)["title"] for line in lines}
    assert {*HILLS[:4]} <= titles
    assert "Ohl" not in titles

    (asked, _) = (tmp_path / "data" / "popqa" / "questions" / "total.jsonl").read_text().splitlines()
    passages = json.loads(asked)["gold_ids"]
    assert (len(passages), passages[0]) == (2, "1")  # BM25's best ones, the first is about the hill

    settings = {
        "model.name": write_tiny_model(tmp_path / "tiny"),
        "augment.generator": "none",
        "augment.import_file": tmp_path / "augmentations.json",
        "run.profile": "laptop",
        "answer.max_new_tokens": 8,  # an untrained model would always make the most
    }
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    work = tmp_path / "work"
    where = ["--data", tmp_path / "data", "--work", work, "--sets", "hotpotqa", "popqa"]
    run_script("run.py", config, *where, *chosen, RAY_ADDRESS=ray_here)
    recipes = {}
    for name in ("hotpotqa", "popqa"):
        store = Store(str(work / "llama-3.2-1b" / name))
        adapters, recipe = open_adapters(store, load_snapshot(store).recipe)
        recipes[name] = (recipe.name, recipe.template, recipe.epochs)
        assert load_snapshot(store).adapters == load_snapshot(store).passages >= 3
        assert adapters.recipe.augment.imported
    assert recipes == {"hotpotqa": ("paper", "chain_of_thought", 1), "popqa": ("paper", "direct", 2)}

    report = json.loads((work / "llama-3.2-1b" / "reports" / "popqa.total" / "report.json").read_text())
    assert report["plan"]["retrieval"] == "oracle"
    assert report["columns"]["prag"]["without_adapter"] == 0
    printed = run_script("table.py", work / "llama-3.2-1b")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(split, printed.splitlines())}
    assert rows["questions"] == ["", "", "", "", "", "", "2", "2", "2", "", ""]
    assert rows["P-RAG, paper"][:2] == ["0.492", "0.399"]
    for title in TABLE["MODES"].values():
        filled = [bool(cell) for cell in rows[f"{title}, here"]]
        assert filled == [False, False, False, False, False, False, True, True, True, False, False], title


def split(line: str) -> list[str]:
    return line.split("|") if line else ["", "", ""]
