"""Do adapters hold what a passage says, and do they add up? `python benchmarks/knowledge.py --data FOLDER`.

The folder holds `augmentations_qwen15.jsonl`, passages (`id`, `title`, `text`) with what a model wrote about them
(`rewrite`, and `qa_raw`: replies in the form of the strategy `lines`), and `augmented_questions.jsonl`, questions about
them with their `answers` and `gold_ids`. The replies go through the same parser and filter as a run's own.

Each model is `prag run` and `prag evaluate` on a store in the folder `--work`, with the default recipe, so a killed
benchmark can be resumed. BM25 retrieves the best passage; in `prag3`, `rag3` and `combine3` the three best ones, whose
adapters are weighed by score.
With `--reader squad:FILE`, `prag warmup --reading` trains a reader on that file's questions, and the evaluation is
repeated with it: `reader_rag` and `reader_combine`. The half `dev` of the questions is for choosing settings, and the
half `test` for a claim. The last line is JSON, by model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import machine

from prag_core.augmentation.augment import MOST_PAIRS
from prag_core.augmentation.coverage import coverage
from prag_core.augmentation.filter import Draft
from prag_core.augmentation.lines import parse_lines
from prag_core.data.files import read_text
from prag_core.data.parsing import parse_json
from prag_core.evaluation.metrics import f1
from prag_core.identity import passage_key
from prag_core.records import Augmentation, LedgerRow, Passage, QAPair, from_table
from prag_core.store.adapters import open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot

ROOT = Path(__file__).parent.parent
# A question is covered if a pair's answer has at least this F1 against an accepted answer.
COVERED_F1 = 0.6
# How a reader is trained: chosen on the atlas (docs/results/log.md).
READING = ("--batch", "4", "--learning-rate", "1e-3", "--limit", "160")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of augmented passages and questions")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=MODEL", help="by default 135m=smollm2-135m-instruct"
    )
    parser.add_argument("--half", choices=("dev", "test", "all"), default="test", help="the questions to ask")
    parser.add_argument("--sets", default="squad,popqa", help="the sets of questions to ask")
    parser.add_argument("--passages", type=int, help="ask about this many gold passages only")
    parser.add_argument("--seeds", type=int, default=3, help="how often random controls are drawn")
    parser.add_argument("--controls", default="wrong,random,task", help="'' for no controls")
    parser.add_argument("--top-k", default="1,3", help="how many passages; the first value is that of the controls")
    parser.add_argument("--weights", default="score", help="how adapters are weighed; the first value is the controls'")
    parser.add_argument("--reader", metavar="FORM:FILE", help="questions with their passages, to train a reader on")
    parser.add_argument("--work", type=Path, default=Path("knowledge"), help="the folder of the stores and reports")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a setting, as `prag` takes it")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = {"coverage": prepare(arguments, work)}
    for model in arguments.model or ["135m=smollm2-135m-instruct"]:
        name, _, folder = model.partition("=")
        found[name] = measure(arguments, work, name, folder)
    print(json.dumps({**found, "half": arguments.half, "machine": machine()}))


def prepare(arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """Write corpus, augmentations and questions; return how well the pairs cover passages and questions."""
    rows = read_rows(arguments.data / "augmentations_qwen15.jsonl")
    passages = [Passage(row["id"], row["title"], row["text"], (row["id"],)) for row in rows]
    drafts = {row["id"]: Draft(passage, MOST_PAIRS) for row, passage in zip(rows, passages, strict=True)}
    for row in rows:
        draft = drafts[row["id"]]
        for pair in (pair for reply in row["qa_raw"] for pair in parse_lines(reply)):
            if len(draft.pairs) < draft.wanted:
                draft.offer(pair)
    sets = arguments.sets.split(",")
    questions = [q for q in read_rows(arguments.data / "augmented_questions.jsonl") if q["set"] in sets]
    questions = [q for q in questions if arguments.half in ("all", half(q["gold_ids"][0]))]
    gold = list(dict.fromkeys(id for q in questions for id in q["gold_ids"]))[: arguments.passages]
    questions = [q for q in questions if set(q["gold_ids"]) <= set(gold)]
    for question in questions:
        pairs = [pair for id in question["gold_ids"] for pair in drafts[id].pairs]
        question["covered"] = is_covered(question, pairs)
        question["type"] = "covered" if question["covered"] else "not covered"
    # With fewer gold passages, the corpus has as many others, so that BM25 has to choose.
    others = [p.key for p in passages if p.key not in gold][: len(gold) if arguments.passages else None]
    kept = {*gold, *others}
    write_rows(
        work / "corpus.jsonl", [{k: row[k] for k in ("id", "title", "text")} for row in rows if row["id"] in kept]
    )
    lines = []
    for row in rows:
        qa = [
            {"question": p.question, "answer": p.answer, "full_answer": p.full_answer} for p in drafts[row["id"]].pairs
        ]
        lines += [{"id": row["id"], "rewrites": [row["rewrite"]], "qa": qa}] if row["id"] in kept and qa else []
    write_rows(work / "augmentations.jsonl", lines)
    write_rows(work / "questions.jsonl", questions)
    refused = sum((draft.refused for draft in drafts.values()), Counter[str]())
    found = {
        "passages": statistics.fmean(coverage(draft.passage, draft.pairs) for draft in drafts.values()),
        "questions": statistics.fmean(question["covered"] for question in questions),
        "pairs": statistics.fmean(len(draft.pairs) for draft in drafts.values()),
    }
    print(f"{len(questions)} questions, {len(kept)} passages; {found}; refused {dict(refused)}", flush=True)
    return {name: round(value, 3) for name, value in found.items()}


def measure(arguments: argparse.Namespace, work: Path, name: str, model: str) -> dict[str, Any]:
    """Run the job, evaluate it, and return F1 by column, differences with intervals, tokens and seconds a passage."""
    chosen = {
        "store": work / name,
        "corpus.path": work / "corpus.jsonl",
        "augment.import_file": work / "augmentations.jsonl",
        "model.name": model,
    }
    settings = [f"{key}={value}" for key, value in chosen.items()] + arguments.overrides
    common = ["-c", "package://pipelines/examples/demo.yaml", *(part for s in settings for part in ("--set", s))]
    prag("run", *common)
    asked = ["--dataset", f"jsonl:{label(work, name)}", "--top-k", arguments.top_k]
    asked += ["--weights", arguments.weights]
    asked += ["--seeds", str(arguments.seeds), "--report", str(work / f"report-{name}")]
    line = evaluate(*common, *asked, "--controls", arguments.controls)
    report = json.loads((work / f"report-{name}" / "report.json").read_text(encoding="utf-8"))
    line["covered"] = {kind: {"n": found["n"], **found["f1"]} for kind, found in report["types"].items()}
    line["rag_wrong"] = summary(report["rag_wrong"])
    if arguments.reader:
        warmup = [*common, "--json", "--reading", *READING, "--exclude", f"jsonl:{work / 'questions.jsonl'}"]
        warmup.append(arguments.reader)
        reader = json.loads(prag("warmup", *warmup))["start"]
        asked += ["--set", f"answer.reader={reader}", "--modes", "rag,combine", "--controls", ""]
        read = evaluate(*common, *asked)
        line["f1"] |= {"reader_rag": read["f1"]["reader_rag"], "reader_combine": read["f1"]["combine"]}
        for values in ("delta", "ci"):
            line[values] |= {f"reader_{pair}": found for pair, found in read[values].items()}
    return {**line, **training_cost(work / name)}


def label(work: Path, name: str) -> Path:
    """Return a file of the questions with their type: a given pair covers it, one that the run has added, or none."""
    store = Store(str(work / name))
    adapters, _ = open_adapters(store, load_snapshot(store).recipe)
    parts = store.list(f"augmentations/{adapters.recipe.augment.fingerprint}", ".parquet")
    pairs = {made.key: made.pairs for made in from_table(Augmentation, store.get_table(Augmentation, parts))}
    keys = {row["id"]: passage_key(row["title"], row["text"]) for row in read_rows(work / "corpus.jsonl")}
    questions = read_rows(work / "questions.jsonl")
    for question in questions:
        made = [pair for id in question["gold_ids"] for pair in pairs.get(keys[id], ())]
        if not question["covered"] and is_covered(question, made):
            question["type"] = "covered by an added pair"
    write_rows(work / f"questions-{name}.jsonl", questions)
    return work / f"questions-{name}.jsonl"


def is_covered(question: dict[str, Any], pairs: Iterable[QAPair]) -> bool:
    """Return whether a pair has an accepted answer of the question."""
    return any(f1(pair.answer, question["answers"]) >= COVERED_F1 for pair in pairs)


def training_cost(folder: Path) -> dict[str, float]:
    """Return the mean training tokens and seconds of an adapter of the published snapshot, as its ledger has them."""
    store = Store(str(folder))
    adapters, _ = open_adapters(store, load_snapshot(store).recipe)
    ledger = store.get_table(LedgerRow, adapters.ledger_parts())
    return {
        "tokens": round(statistics.fmean(ledger["tokens"].to_pylist())),
        "seconds_a_passage": round(statistics.fmean(ledger["seconds"].to_pylist()), 2),
    }


def summary(subset: dict[str, Any]) -> dict[str, Any]:
    """Return F1 by column and the differences of F1, with intervals, of some of the questions of a report."""
    found = [d for d in subset["differences"] if d["metric"] == "f1"]
    names = [f"{d['left']}_{d['right']}" for d in found]
    delta = dict(zip(names, (d["mean"] for d in found), strict=True))
    intervals = dict(zip(names, ([d["low"], d["high"]] for d in found), strict=True))
    return {"n": subset["n"], "f1": subset["f1"], "delta": delta, "ci": intervals}


def prag(*arguments: str) -> str:
    """Run a command of the project and return its output."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluate(*arguments: str) -> dict[str, Any]:
    """Evaluate, print the tables, and return the last line; a column of another k is named by it, such as `prag3`."""
    printed = prag("evaluate", *arguments)
    print(printed, flush=True)
    line: dict[str, Any] = json.loads(printed.splitlines()[-1])
    line["f1"] = {column.replace("_k", ""): value for column, value in line["f1"].items()}
    return line


def half(id: str) -> str:
    """Return the half that a gold passage's questions belong to."""
    return "dev" if int(hashlib.sha256(id.encode()).hexdigest(), 16) % 2 == 0 else "test"


def read_rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines, which also splits at line separators that JSON strings may contain.
    lines = read_text(str(path), "--data names the folder that holds it").split("\n")
    return [parse_json(line) for line in lines if line.strip()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
