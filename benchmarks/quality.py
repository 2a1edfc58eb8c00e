"""Does the model know the passages? Modes and controls, with intervals: `python benchmarks/quality.py`.

It asks enough questions for the claims that are made, of two sets:

1. `atlas`: all invented passages, with the augmentations that come with them. The questions are about the held-out
   half, or with `--split dev` about the other half, on which recipes and settings are tuned.
2. `wiki`, with `--data`: real questions of SQuAD and of PopQA, drawn by a seed, over a corpus of their gold passages,
   which the base model augments itself. The folder holds `corpus.jsonl.gz` (`id`, `title`, `text`) and, for each set,
   `questions_<set>.jsonl` as `prag evaluate` reads them.

`--reader` names questions that bring their passages, such as SQuAD's file. A reader is then trained on some of them
first (`prag warmup --reading`) and added in `combine`.

Each set is `prag run` and `prag evaluate` on a store in the folder `--work`, so a killed benchmark can be resumed. The
model is the packaged one, the recipe `--recipe`, and BM25 retrieves the one best passage. The last line is JSON: the
last line of `prag evaluate`, by set.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).parent.parent
SETS = ("squad", "popqa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="the folder of real questions and passages; by default only the atlas"
    )
    parser.add_argument("--questions", type=int, default=100, help="questions of each set")
    parser.add_argument("--recipe", default="recall")
    parser.add_argument("--seeds", type=int, default=3, help="how often random controls are drawn")
    parser.add_argument("--work", type=Path, default=Path("quality"), help="the folder of the stores and reports")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="the half of the atlas to ask about")
    parser.add_argument("--modes", default="closed,rag,prag,combine")
    parser.add_argument("--controls", default="wrong,random,task,da", help="'' for no controls")
    parser.add_argument("--reader", type=Path, help="questions with their passages, to train a reader on")
    parser.add_argument(
        "--strength", default="0.5,1", help="factors of the adapters' weights in combine; the first one counts"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a setting, as `prag` takes it")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = {"atlas": evaluate(arguments, "atlas", [], "atlas", "--split", arguments.split)}
    if arguments.data:
        questions, corpus = draw(arguments.data, arguments.questions, arguments.work)
        settings = [f"corpus.path={corpus}", "augment.import_file=null"]
        found["wiki"] = evaluate(arguments, "wiki", settings, f"jsonl:{questions}")
    print(json.dumps({"recipe": arguments.recipe, **found, "machine": machine()}))


def draw(data: Path, count: int, work: Path) -> tuple[Path, Path]:
    """Draw questions, and write them, each with its set as its type, and a corpus of their gold passages."""
    drawn: list[dict[str, Any]] = []
    for name in SETS:
        lines = (data / f"questions_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        drawn += [{**row, "type": name} for row in random.Random(0).sample(rows, count)]
    gold = {id for row in drawn for id in row["gold_ids"]}
    with gzip.open(data / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
        passages = [line for line in stream if json.loads(line)["id"] in gold]
    questions, corpus = work / "questions.jsonl", work / "corpus.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in drawn), encoding="utf-8")
    corpus.write_text("".join(passages), encoding="utf-8")
    print(f"{len(drawn)} questions about {len(passages)} passages", flush=True)
    return questions, corpus


def reader(arguments: argparse.Namespace, name: str, warmup: list[str], dataset: str) -> str:
    """Train a reader in the store, unless it has one, and return its name."""
    kept = arguments.work / f"reader-{name}-{arguments.recipe}.json"
    if not kept.exists():
        command = [*warmup, "--reading", "--exclude", dataset, "--learning-rate", "1e-3", "--batch", "4"]
        command += ["--limit", "160", "--json", str(arguments.reader.resolve())]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        kept.write_text(done.stdout)
    return str(json.loads(kept.read_text())["start"])


def evaluate(arguments: argparse.Namespace, name: str, settings: list[str], dataset: str, *more: str) -> dict[str, Any]:
    """Run the job on a store of its own, evaluate it, and return the last line that the evaluation printed."""
    settings = [f"store={arguments.work / name}", f"train.recipe={arguments.recipe}", *settings, *arguments.overrides]
    common = ["-c", "package://pipelines/examples/demo.yaml"]
    common += [part for setting in settings for part in ("--set", setting)]
    prag = [sys.executable, "-m", "pipelines.cli"]
    subprocess.run([*prag, "run", *common], cwd=ROOT, check=True)
    if arguments.reader is not None:
        common += ["--set", f"answer.reader={reader(arguments, name, [*prag, 'warmup', *common], dataset)}"]
    read = "" if arguments.reader is None else "-reader"
    report = str(arguments.work / f"report-{name}-{arguments.recipe}{read}")
    asked = ["--dataset", dataset, *more, "--modes", arguments.modes, "--controls", arguments.controls]
    asked += ["--seeds", str(arguments.seeds), "--strength", arguments.strength, "--report", report]
    done = subprocess.run([*prag, "evaluate", *common, *asked], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
